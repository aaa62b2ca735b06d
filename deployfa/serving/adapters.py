"""Which adapters a served model has, while it serves: load, replace and unload them under running requests.

Some are in memory, the rest on disk, where one lies until a request names it; the one that was not used for the
longest then goes.  What a request has taken stays as it is until its answer is made.

Three kinds of locks, taken in this order.  A name's *turn*: one change of it at a time, reading its file included; who
wants the same waits for that one.  *Placing*: the writing of one row, and evictions.  The catalogue's own, a short one,
which ``take`` takes too.

The order of a load: the file is written aside, then read and put into memory, then renamed, from when on it counts.  So
what does not fit, or has no room on the disk, changes nothing, and a server that is killed begins again with the old
adapter or with the new one, whole.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deployfa.errors import AdapterFormatError, BaseMismatchError, DeployfaError, EditError, InputError, SiteError
from deployfa.serving.adapter_store import AdapterStore, check_stored_name
from deployfa.serving.catalogue import AdapterInfo, Catalogue, Entry
from deployfa.serving.holders import Holder, Put
from deployfa.serving.taken import Taken
from deployfa.serving.turns import Turns
from deployfa.tables.checks import BASE

__all__ = ["AdapterInfo", "AdapterRegistry"]

#: What a file itself is to blame for, and will be until it is another file.
_OF_THE_FILE = (AdapterFormatError, BaseMismatchError, EditError, SiteError)


class AdapterRegistry:
    """The adapters of one model.  Thread-safe; ``take`` is for an event loop, whatever changes anything takes long.

    store: where adapters are kept; without one they are gone at the end, and none can be evicted.  max_resident: how
    many may be in memory beside the bundle's own, which always are; by default as many as ``holder`` has room for.
    Call ``restore`` before the first request.
    """

    def __init__(self, holder: Holder, *, store: AdapterStore | None = None, max_resident: int | None = None) -> None:
        if max_resident is not None and max_resident < 1:
            raise InputError(f"max_resident is {max_resident}; pass 1 or more")
        self._holder = holder
        self._store = store
        self._max_resident = max_resident
        self._catalogue = Catalogue(holder.held())
        self._turns = Turns()
        self._placing = threading.Lock()

    @property
    def counters(self) -> dict[str, int]:
        """``loads`` into memory, ``replacements`` of a name's adapter, ``evictions``, and ``failures`` to load."""
        return self._catalogue.counters

    @property
    def resident(self) -> int:
        """How many adapters are in memory, the base aside."""
        return sum(entry.resident for entry in self._catalogue.entries() if entry.name != BASE)

    def __contains__(self, name: str) -> bool:
        return self._catalogue.find(name) is not None

    def some_names(self) -> str:
        """A few names and how many more there are, for a message."""
        return self._catalogue.some_names()

    def list(self) -> Sequence[AdapterInfo]:
        """All adapters, the base first, then the bundle's own, then the others in the order of their names."""
        size = self._holder.row_bytes
        return [entry.info(size) for entry in self._catalogue.entries()]

    def take(self, name: str) -> Taken | None:
        """The adapter for one request, to be closed; ``None`` if it must be fetched.  Takes microseconds.

        Raises ``InputError``, with the nearest names, if there is none of that name.
        """
        entry = self._catalogue.known(name)
        # whether it is in memory the holder says: nothing changes between its looking and its taking
        taken = self._holder.take(name)
        if taken is not None:
            self._catalogue.used(entry)
        return taken

    def fetch(self, name: str) -> Taken:
        """``take``, from the disk if need be.  Waits for whoever loads it already.

        Raises ``InputError`` if there is none of that name, and why its file cannot be loaded if it cannot.
        """
        with self._turns.of(name):
            taken = self.take(name)
            if taken is None:
                entry = self._catalogue.known(name)
                with self._counting_failures():
                    taken = self._bring(entry)
                self._catalogue.used(entry)
            return taken

    def load(self, name: str, content: bytes | Path, suffix: str) -> AdapterInfo:
        """Add or replace ``name``: from now on requests get the new one.  ``content``: a file, or its bytes.

        Raises ``InputError`` on a name, a suffix or a file that cannot be, ``BaseMismatchError``, ``SiteError`` or
        ``EditError`` on an adapter that does not fit, and ``StorageError`` if it cannot be kept; the old one then goes
        on serving, and its file stays.
        """
        with self._counting_failures():
            self._holder.check_changeable()
            check_stored_name(name)
            if suffix not in self._holder.suffixes:
                raise InputError(
                    f"'{suffix}' files are not for this model; pass one of {', '.join(self._holder.suffixes)}"
                )
            with self._turns.of(name), self._aside(name, content, suffix) as (file, commit):
                known = self._catalogue.find(name)
                entry = known or Entry(name, pinned=name in self._catalogue.own or self._store is None)
                self._place(entry, self._prepare(name, file), commit).close()
                if known is not None:
                    self._catalogue.count("replacements")
                return entry.info(self._holder.row_bytes)

    def unload(self, name: str) -> None:
        """Forget ``name``, and its file; what requests have taken of it stays until they are answered.

        Raises ``InputError`` if there is none of that name, or it is the base, and ``StorageError``, and it stays, if
        the disk refuses.
        """
        self._holder.check_changeable()
        check_stored_name(name)
        with self._turns.of(name):
            entry = self._catalogue.known(name)
            if self._store is not None:
                self._store.remove(name, mark=name in self._catalogue.own)
            self._leave(entry, forget=True)

    def restore(self) -> Sequence[tuple[str, str]]:
        """Load again what the store keeps: what replaces the bundle's own, then the newest files, ``max_resident`` at
        most.  Returns (name, reason) of what cannot be loaded; it stays known, and nothing else answers for it.
        """
        if self._store is None:
            return []
        own, names = self._catalogue.own, self._store.names()
        for name in self._store.removed() & own:
            self._leave(self._catalogue.known(name), forget=True)
        self._catalogue.add(Entry(name, pinned=name in own) for name in names)
        failed = self._store.odd()
        # the newest first; sorted keeps that order
        for name in sorted(names, key=lambda name: name not in own):
            full = self._holder.full or self._catalogue.evictable == self._max_resident
            if full and name not in own:
                break
            entry = self._catalogue.known(name)
            try:
                with self._turns.of(name), self._counting_failures():
                    self._bring(entry).close()
            except (DeployfaError, OSError) as error:
                failed.append((name, str(error)))
                # the bundle's own, which was replaced, must not be taken for what replaced it
                self._leave(entry)
        self._catalogue.order(names)
        return failed

    def _bring(self, entry: Entry) -> Taken:
        """Load ``entry`` from its file; the caller has its turn."""
        file = self._store.file(entry.name) if self._store is not None else None
        if file is None:
            raise InputError(f"adapter '{entry.name}' has no file any more; load it again")
        identity = _identity(file)
        if entry.refused is not None and entry.refused[0] == identity:
            error = entry.refused[1]
            raise type(error)(str(error))
        try:
            return self._place(entry, self._prepare(entry.name, file), lambda: None)
        except _OF_THE_FILE as error:
            # requests that ask for it again do not read it again
            entry.refused = identity, type(error)(str(error))
            raise

    def _prepare(self, name: str, file: Path) -> Put:
        try:
            return self._holder.prepare(name, file)
        except DeployfaError as error:
            # whoever asks need not know where the server keeps it
            error.args = (str(error).replace(f"'{file}'", f"'{name}'"),)
            raise

    def _place(self, entry: Entry, put: Put, commit: Callable[[], None]) -> Taken:
        """Put ``entry`` into memory, and take it before anyone can evict it; the caller has its turn."""
        with self._placing:
            if not entry.resident:
                self._make_room(entry.name)
            facts = put(commit)
            taken = self._holder.take(entry.name)
            assert taken is not None  # only who places drops anything
            self._catalogue.placed(entry, facts)
            while self._max_resident is not None and self._catalogue.evictable > self._max_resident:
                self._evict(entry.name)
        return taken

    def _make_room(self, name: str) -> None:
        """Evict one where there is no place for one more; beyond ``max_resident`` only after ``name`` is there, so that
        what does not fit costs nobody's place."""
        if self._holder.full:
            self._evict(name)
        if self._store is not None or self._max_resident is None:
            return
        here = sum(entry.resident and entry.name not in self._catalogue.own for entry in self._catalogue.entries())
        if here >= self._max_resident:
            raise InputError(
                f"{here} adapters are in memory and none of them on disk, so none can make room; unload one, or serve "
                "with --state"
            )

    def _evict(self, but: str) -> None:
        name = self._catalogue.evicted(but)
        if name is not None:
            self._holder.drop(name)

    def _leave(self, entry: Entry, *, forget: bool = False) -> None:
        """Take ``entry`` out of memory; ``forget``: and out of all that is known."""
        with self._placing:
            if self._catalogue.left(entry, forget=forget):
                self._holder.drop(entry.name)

    @contextlib.contextmanager
    def _aside(self, name: str, content: bytes | Path, suffix: str) -> Iterator[tuple[Path, Callable[[], None]]]:
        """The file of ``content``, to be read, and what makes it count."""
        if self._store is not None:
            with self._store.incoming(name, content, suffix) as incoming:
                yield incoming.file, incoming.commit
            return
        with tempfile.TemporaryDirectory(prefix="deployfa-adapter-") as folder:
            file = Path(folder) / f"adapter{suffix}"
            file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            yield file, lambda: None

    @contextlib.contextmanager
    def _counting_failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._catalogue.count("failures")
            raise


def _identity(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
