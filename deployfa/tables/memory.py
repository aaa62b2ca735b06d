"""Memory for rows that grows without moving: readers keep their views while rows are added behind them.

Address space for every row that there may ever be is reserved at once; the operating system commits a page when it is
first written.  So a longer array is a new view of the same memory, and what is not written costs nothing.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from deployfa.edits import Array
from deployfa.errors import InputError

__all__ = ["RowMemory"]

#: Every tensor starts at a page, which is more than any vector unit asks for.
_ALIGNMENT = 4096


class RowMemory:
    """Tensor → (rows, *its shape in one row), float32, zero at first.

    Not thread-safe for one row; different rows may be written and read at the same time.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], wanted: int, least: int) -> None:
        """Reserve ``wanted`` rows, or half as many as often as the system refuses, but no fewer than ``least``.

        Raises ``InputError`` if not even those can be reserved.
        """
        self.row_bytes = 4 * sum(math.prod(shape) for shape in shapes.values())
        rows = max(wanted, least)
        while (mapping := _reserve(shapes, rows)) is None:
            if rows == least:
                raise InputError(
                    f"cannot reserve {rows * self.row_bytes / 1e9:.1f} GB of address space for {rows} rows; pass a "
                    "smaller max_adapters"
                )
            rows = max(least, rows // 2)
        self.rows = rows
        self._whole: dict[str, Array] = {}
        start = 0
        for name, shape in shapes.items():
            numbers = rows * math.prod(shape)
            self._whole[name] = np.frombuffer(mapping, np.float32, numbers, start).reshape(rows, *shape)
            start += _padded(4 * numbers)
        self._views: tuple[int, Mapping[str, Array]] = 0, MappingProxyType({})

    def views(self, rows: int) -> Mapping[str, Array]:
        """Tensor → the first ``rows`` rows, read-only; the same objects until another number is asked for."""
        known, views = self._views
        if known != rows:
            views = MappingProxyType({name: _read_only(whole[:rows]) for name, whole in self._whole.items()})
            self._views = rows, views
        return views

    def row(self, number: int) -> dict[str, Array]:
        """Tensor → one row, a read-only view."""
        return {name: _read_only(whole[number]) for name, whole in self._whole.items()}

    def write(self, number: int, values: Mapping[str, Array]) -> None:
        """Write every tensor of one row."""
        for name, whole in self._whole.items():
            whole[number] = values[name]

    def rows_of(self, name: str, start: int, stop: int) -> Array:
        """The rows ``start:stop`` of one tensor, to be written."""
        return self._whole[name][start:stop]


def _reserve(shapes: Mapping[str, tuple[int, ...]], rows: int) -> mmap.mmap | None:
    size = sum(_padded(4 * rows * math.prod(shape)) for shape in shapes.values())
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, size)
        # private: a forked worker gets its own copy of what it changes.  Without a claim on swap for pages that may
        # never be written; Python names that flag from 3.13 on only.
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except (OSError, ValueError, OverflowError, MemoryError):
        return None


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _read_only(view: Array) -> Array:
    view.flags.writeable = False
    return view
