"""What a reader holds during one inference: the table as it was when the lease was taken."""

from __future__ import annotations

import difflib
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from deployfa.edits import Array
from deployfa.errors import InputError
from deployfa.tables.history import History, Version

__all__ = ["Lease", "unknown_name"]


class Lease:
    """A consistent view of a table; ``with table.snapshot() as lease:`` around one inference.

    ``arrays``: tensor → (n, *its shape in one row), read-only views without a copy.  Until the lease is closed, the
    rows of every name that it knows stay as they are, whatever is replaced or removed meanwhile.  Row numbers are good
    within their lease only: later a row may be another adapter's.  ``epoch`` grows with every change of the table, so
    two leases of one epoch see the same.  A lease that is never closed keeps its rows from being reused for ever.
    """

    def __init__(
        self, history: History, epoch: int, arrays: Mapping[str, Array], clear: Callable[[Sequence[int]], None]
    ) -> None:
        self.epoch = epoch
        self._arrays = arrays
        self._history = history
        self._clear = clear
        self._closing = threading.Lock()
        self._closed = False

    @property
    def arrays(self) -> Mapping[str, Array]:
        self._check_open()
        return self._arrays

    def rows(self, names: Iterable[str]) -> npt.NDArray[np.int64]:
        """Names → their rows, (len(names),), what a graph's ``adapter_ids`` takes; ``InputError`` on an unknown one."""
        return np.array([version.row for version in self._find(names)], np.int64)

    def labels(self, name: str) -> tuple[str, ...]:
        """What the answers of ``name`` mean; empty if the adapter does not say."""
        return self._find([name])[0].member.labels

    def names(self) -> list[str]:
        """All names, the base's first."""
        return [version.member.name for version in self.versions()]

    def versions(self) -> list[Version]:
        """All adapters and their rows, the base first."""
        self._check_open()
        return self._history.versions(self.epoch)

    def close(self) -> None:
        """Let go of the rows; a second call does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        self._clear(self._history.close(self.epoch))

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # not closed here: whoever lost the lease may still read its arrays, where no other adapter's row may come
        if not getattr(self, "_closed", True):
            warnings.warn("a lease of an adapter table was never closed", ResourceWarning, source=self, stacklevel=2)

    def _find(self, names: Iterable[str]) -> list[Version]:
        self._check_open()
        asked = list(names)
        found = self._history.find_all(asked, self.epoch)
        for name, version in zip(asked, found, strict=True):
            if version is None:
                raise unknown_name(name, self.names())
        return [version for version in found if version is not None]

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the lease is closed, its rows may be another adapter's by now; take a new snapshot()")


def unknown_name(name: str, known: Sequence[str]) -> InputError:
    """``adapter 'shp' is not in the table; nearest names: shop``."""
    near = difflib.get_close_matches(name, known, n=4) if isinstance(name, str) else []
    shown = near or list(known[:4])
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return InputError(
        f"adapter {name!r} is not in the table; {'nearest names' if near else 'names'}: {', '.join(shown)}{more}"
    )
