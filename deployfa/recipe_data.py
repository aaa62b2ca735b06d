"""The rows that a recipe trains on when nobody brings any: real data, prepared once into the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from deployfa.assets import cache_errors
from deployfa.cache import cache_dir
from deployfa.digits import prepare_digits
from deployfa.recipe import Data
from deployfa.vader import prepare_vader

__all__ = ["OwnRows", "own_rows"]

#: Raised when the same sizes give other rows.
_REVISION = 1


@dataclass(frozen=True)
class OwnRows:
    """Files of rows: to train on, to test on, and of other domains by name."""

    train: Path
    test: Path
    shifted: dict[str, Path]


def own_rows(data: Data, *, progress: Callable[[str], None] | None = None) -> OwnRows:
    """The files of ``data``; raises what ``deployfa.assets.fetch`` raises, and ``StorageError``."""
    # without scikit-learn there are fewer domains, which must not stay so when it is installed
    more = "" if find_spec("sklearn") is None else "-more"
    folder = cache_dir() / "data" / f"{data.name}-{data.train_rows}-{data.test_rows}.{_REVISION}{more}"
    # without the lock first: a cache on a read-only disk has no room for a lock file
    if not folder.is_dir():
        with cache_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):
                if not folder.is_dir():
                    _prepare(data, folder, progress)
    suffix = ".npz" if data.name == "digits" else ".csv"
    files = {file.stem: file for file in sorted(folder.glob(f"*{suffix}"))}
    (train,) = (name for name in files if name.endswith("_train"))
    (test,) = (name for name in files if name.endswith("_test"))
    return OwnRows(files.pop(train), files.pop(test), files)


def _prepare(data: Data, folder: Path, progress: Callable[[str], None] | None) -> None:
    if data.name == "digits":
        prepare_digits(folder, train_size=data.train_rows, test_size=data.test_rows, progress=progress)
        return
    prepare_vader(
        folder,
        train_size=data.train_rows,
        test_size=data.test_rows,
        shifted_size=data.test_rows,
        progress=progress,
    )
