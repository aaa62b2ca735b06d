"""Outputs appear whole or not at all: write aside in the same folder, then rename.

``os.replace`` is atomic on one file system.  A process killed half-way leaves only a hidden folder named
``.NAME.partial-PID``; the next write of the same output sweeps those whose process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from deployfa.errors import OutputExistsError, StorageError

__all__ = ["check_output", "storage_errors", "write_directory", "write_file"]

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_output(path: Path, *, force: bool, holding: str | None = None) -> None:
    """Raise ``OutputExistsError`` before long work starts, not after it.

    ``force`` replaces what is there, but never the folder that one stands in, nor one above it; with ``holding``, only
    an empty folder or one that holds a file of that name, so that a slip costs nobody's files: ``StorageError``.
    """
    if path.exists() and not force:
        raise OutputExistsError(path)
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):
        raise StorageError(f"'{path}' holds the folder you are in and is never replaced; pass another --out")
    if holding is None or not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / holding).is_file()):
        raise StorageError(f"'{path}' is not a folder with {holding}, so --force leaves it alone; pass another --out")


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``target`` into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            free = shutil.disk_usage(_nearest_folder(target)).free
            raise StorageError(
                f"no space left to write '{target}' ({free / 1e6:.1f} MB free); free some space or pass another --out"
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}:
            raise StorageError(f"may not write '{target}' ({error.strerror}); pass another --out") from error
        raise


@contextlib.contextmanager
def write_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it becomes ``path``, on any error it is removed."""
    with _aside(path, force=force) as partial:
        yield partial


@contextlib.contextmanager
def write_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``path``; on success it becomes ``path``, on any error it is removed.

    With ``force`` the old directory stays in place until the new one is complete.
    """
    with _aside(path, force=force) as partial:
        partial.mkdir()
        yield partial


@contextlib.contextmanager
def _aside(path: Path, *, force: bool) -> Iterator[Path]:
    check_output(path, force=force)
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(
                f"'{path.parent}' is not a folder, so '{path}' cannot be made; pass another --out"
            ) from error
        _sweep(path)
        partial = path.parent / f".{path.name}.partial-{os.getpid()}"
        _remove(partial)
        try:
            yield partial
            # again: another process may have written the same output meanwhile
            check_output(path, force=force)
            _swap(partial, path)
        except OSError as error:
            _remove(partial)
            raise error
        except BaseException as error:
            _remove(partial)
            # libraries that write through native code report a full disk as their own exception
            if _says_no_space(error):
                raise OSError(errno.ENOSPC, "no space left on device") from error
            raise


def _swap(partial: Path, path: Path) -> None:
    """Put ``partial`` in the place of ``path``; the old one is gone only once the new one is there."""
    if not path.exists() or not (path.is_dir() or partial.is_dir()):
        os.replace(partial, path)
        return
    old = path.parent / f".{path.name}.old-{os.getpid()}"
    _remove(old)
    try:
        os.replace(path, old)
        os.replace(partial, path)
    except BaseException:  # a signal between the two, too
        if os.path.lexists(old) and not os.path.lexists(path):
            os.replace(old, path)
        raise
    _remove(old)


def _sweep(path: Path) -> None:
    for stale in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        pid = stale.name.rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            _remove(stale)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _says_no_space(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, Exception) and ("no space left" in text or "os error 28" in text or "errno 28" in text)


def _nearest_folder(path: Path) -> Path:
    for folder in (path, *path.resolve().parents):
        if folder.is_dir():
            return folder
    return Path("/")
