"""The files of one model's adapters on disk: what a server that is killed, at any moment, begins with again.

The folder is the truth, there is no index beside it::

    NAME.safetensors     one file per adapter, or .pt, or .onnx_adapter; NAME is percent-encoded
    NAME.removed         an adapter that the bundle brings and that was removed
    .incoming/           what is being written; swept when the folder is opened
    .lock                held by the server that uses the folder

A file counts from its renaming on.  Of two files of one name, left by a kill in between, the newer one counts, and a
file counts more than a mark that its name was removed; the rest is swept when the folder is opened.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from deployfa.errors import InputError, StorageError
from deployfa.tables.checks import check_name

__all__ = ["SUFFIXES", "AdapterStore", "Incoming", "check_stored_name"]

#: What a file may be.
SUFFIXES = (".safetensors", ".pt", ".onnx_adapter")
_REMOVED = ".removed"
_LOCK, _INCOMING = ".lock", ".incoming"
#: Bytes of a name; percent-encoded it and the suffix must be shorter than the 255 bytes of a file name.
_LONGEST, _LONGEST_QUOTED = 128, 200


def check_stored_name(name: str) -> None:
    """Raise ``InputError`` unless ``name`` can name an adapter that is kept: printable, not ``base``, not too long."""
    check_name(name)
    size, quoted = len(name.encode()), len(_quoted(name))
    if size > _LONGEST or quoted > _LONGEST_QUOTED:
        raise InputError(
            f"the name '{name[:20]}…' has {size} bytes, {quoted} percent-encoded; pass one of at most {_LONGEST}, "
            f"{_LONGEST_QUOTED} percent-encoded"
        )


@dataclass(frozen=True, slots=True)
class Incoming:
    """A file that was written and does not count yet; ``commit`` makes it count, at once and whole."""

    file: Path
    commit: Callable[[], None]


class AdapterStore:
    """One folder, for one server.  Thread-safe, but for two changes of one name at a time.

    Raises ``InputError`` if another server uses ``folder`` and ``StorageError`` if it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._incoming = folder / _INCOMING
        with _storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # of the object, not of the thread that made it: another one may close it
            self._held = FileLock(folder / _LOCK, thread_local=False)
            try:
                self._held.acquire(timeout=0)
            except Timeout as error:
                raise InputError(f"'{folder}' is used by another server; pass another --state") from error
        self._changing = threading.Lock()
        #: name → its file
        self._files: dict[str, Path] = {}
        self._removed: set[str] = set()
        #: file name → why it is left alone
        self._odd: dict[str, str] = {}
        try:
            with _storage(folder):
                self._open()
        except BaseException:
            self._held.release()
            raise

    @property
    def folder(self) -> Path:
        return self._folder

    def names(self) -> list[str]:
        """All adapters that have a file, the newest file first."""
        with self._changing:
            files = list(self._files.items())
        return [name for name, file in sorted(files, key=lambda item: (-_written(item[1]), item[0]))]

    def removed(self) -> set[str]:
        """Adapters of the bundle that were removed."""
        with self._changing:
            return set(self._removed)

    def odd(self) -> list[tuple[str, str]]:
        """(file name, reason) of what lay in the folder and is none of its adapters; it is left alone."""
        return sorted(self._odd.items())

    def file(self, name: str) -> Path | None:
        """Where ``name`` is, ``None`` if it has no file."""
        with self._changing:
            return self._files.get(name)

    def put(self, name: str, content: bytes | Path, suffix: str) -> None:
        """Add or replace the file of ``name``, unread; raises what ``incoming`` raises, and all is as it was then."""
        with self.incoming(name, content, suffix) as incoming:
            incoming.commit()

    @contextlib.contextmanager
    def incoming(self, name: str, content: bytes | Path, suffix: str) -> Iterator[Incoming]:
        """Write ``content`` aside, safe from a loss of power, to be looked at before it counts.

        What was not committed within is removed.  Raises ``InputError`` on a name or a suffix that cannot be, or on
        ``content`` that is no file, and ``StorageError`` if it cannot be written.
        """
        check_stored_name(name)
        if suffix not in SUFFIXES:
            raise InputError(f"an adapter cannot be kept as '{suffix}'; pass one of {', '.join(SUFFIXES)}")
        aside = self._incoming / f"{_quoted(name)}{suffix}"
        committed = False

        def commit() -> None:
            nonlocal committed
            self._commit(name, aside, suffix)
            committed = True

        with _stream(content) as source:
            try:
                with _storage(aside), aside.open("wb") as stream:
                    shutil.copyfileobj(source, stream, 1 << 20)
                    stream.flush()
                    os.fsync(stream.fileno())
                yield Incoming(aside, commit)
            finally:
                with contextlib.suppress(OSError):
                    aside.unlink(missing_ok=True)
        if committed:
            self._sync()

    def remove(self, name: str, *, mark: bool = False) -> None:
        """Remove the file of ``name`` if there is one; ``mark``: the bundle brings it, and shall not bring it back.

        Raises ``StorageError`` if that cannot be done; it is there then as it was.
        """
        check_stored_name(name)
        file = self.file(name)
        tombstone = self._tombstone(name)
        with _storage(self._folder):
            # the mark first: a kill between the two leaves the file, which counts more, and not the bundle's own
            if mark:
                with tombstone.open("wb") as stream:
                    os.fsync(stream.fileno())
                self._sync()
            if file is not None:
                file.unlink(missing_ok=True)
        with self._changing:
            self._files.pop(name, None)
            if mark:
                self._removed.add(name)
        self._sync()

    def close(self) -> None:
        """Let another server have the folder."""
        self._held.release()

    def _commit(self, name: str, aside: Path, suffix: str) -> None:
        target = self._folder / f"{_quoted(name)}{suffix}"
        with _storage(target):
            os.replace(aside, target)
        with self._changing:
            old = self._files.get(name)
            self._files[name] = target
            self._removed.discard(name)
        # it counts already, and without these: see the rules above
        with contextlib.suppress(OSError):
            if old is not None and old != target:
                old.unlink(missing_ok=True)
            self._tombstone(name).unlink(missing_ok=True)

    def _open(self) -> None:
        """Find what is there; sweep what a killed server left."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(exist_ok=True)
        found: dict[str, list[Path]] = {}
        marks: list[str] = []
        for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
            if entry.name in (_LOCK, _INCOMING):
                continue
            stem, dot, end = entry.name.rpartition(".")
            name = unquote(stem)
            try:
                if f"{dot}{end}" not in (*SUFFIXES, _REMOVED) or not entry.is_file(follow_symlinks=False):
                    raise InputError(f"it is no file that ends in one of {', '.join(SUFFIXES)}; move it away")
                check_stored_name(name)
                if _quoted(name) != stem:
                    raise InputError(f"its adapter would be kept as '{_quoted(name)}.{end}'; load it by its name")
            except InputError as error:
                self._odd[entry.name] = str(error)
                continue
            if end == _REMOVED[1:]:
                marks.append(name)
            else:
                found.setdefault(name, []).append(Path(entry.path))
        for name, files in found.items():
            *older, newest = sorted(files, key=_written)
            self._files[name] = newest
            for file in older:
                file.unlink()
        for name in marks:
            if name in self._files:
                self._tombstone(name).unlink()
            else:
                self._removed.add(name)
        self._sync()

    def _tombstone(self, name: str) -> Path:
        return self._folder / f"{_quoted(name)}{_REMOVED}"

    def _sync(self) -> None:
        """Make the folder's entries safe from a loss of power, where the system can."""
        # what was renamed counts already: a disk that refuses this cannot take it back
        with contextlib.suppress(OSError):
            number = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _stream(content: bytes | Path) -> io.BufferedIOBase:
    if isinstance(content, bytes):
        return io.BytesIO(content)
    try:
        return content.open("rb")
    except OSError as error:
        raise InputError(f"cannot read '{content}' ({error.strerror}); pass an adapter file") from error


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write '{path}' ({error.strerror or error}); free some space or pass another --state"
        ) from error
