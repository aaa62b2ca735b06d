"""What a graph takes and gives, and whether a request's tensors are that: all is checked before anything waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deployfa.edits import Array
from deployfa.errors import RequestError
from deployfa.runtimes.runner import TensorSpec
from deployfa.serving.datatypes import datatype_of

__all__ = ["Rows", "Signature"]

MASK = "attention_mask"


@dataclass(frozen=True, slots=True)
class Rows:
    """A request's tensors, all checked.  ``length``: of the dimension that is padded, 1 where none is; ``shape``: what
    must be equal for two requests to share a batch, padding aside."""

    feeds: Mapping[str, Array]
    rows: int
    length: int
    shape: tuple[tuple[int, ...], ...]


class Signature:
    """``inputs``, ``outputs``: of the graph; ``ranges``: see ``index_ranges``; ``fill``: what the token ids of a padded
    row end in.

    Rows can be batched if every input and output begins with one dimension of the same name.  Rows of different lengths
    can be padded to one if there is an attention mask, (batch, length), which says which positions count.
    """

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        ranges: Mapping[str, int] | None = None,
        fill: int = 0,
    ) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.ranges = dict(ranges or {})
        self._known = {spec.name: spec for spec in inputs}
        firsts = {spec.shape[0] if spec.shape else None for spec in (*inputs, *outputs)}
        first = next(iter(firsts)) if len(firsts) == 1 else None
        #: the name of the dimension that counts rows, None if rows cannot be batched
        self.batch = first if isinstance(first, str) else None
        self.padded = self._padded_dimension()
        self._fill = {name: 0 for name in self._known} | {"input_ids": fill}

    def _padded_dimension(self) -> str | None:
        mask = self._known.get(MASK)
        if self.batch is None or mask is None or len(mask.shape) != 2 or not isinstance(mask.shape[1], str):
            return None
        name = mask.shape[1]
        # right of the rows and nowhere else, so that a row is padded in one way only
        alone = all(name not in spec.shape or spec.shape == (self.batch, name) for spec in self.inputs)
        return name if alone else None

    def check(self, feeds: Mapping[str, Array], *, max_rows: int, max_tokens: int) -> Rows:
        """Raises ``RequestError``: which input, what it is, what it should be."""
        for name in feeds:
            if name not in self._known:
                raise RequestError(f"'{name[:80]}' is no input; the inputs: {', '.join(self._known)}")
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            array = feeds.get(spec.name)
            if array is None:
                raise RequestError(f"input '{spec.name}' is missing; send all of: {', '.join(self._known)}")
            self._check_one(spec, array, sizes)
        rows = sizes[self.batch][0] if self.batch is not None else 1
        length = sizes[self.padded][0] if self.padded is not None else 1
        if self.batch is not None and rows > max_rows:
            raise RequestError(f"the request has {rows} rows; send {max_rows} at most, and more requests")
        if rows * length > max_tokens:
            raise RequestError(
                f"the request has {rows} x {length} tokens; send {max_tokens:,} at most, and more requests"
            )
        for name, stop in self.ranges.items():
            self._check_range(name, feeds.get(name), stop)
        if self.padded is not None and not feeds[MASK].any(axis=1).all():
            raise RequestError(f"a row of {MASK} is all zeros; mask no whole row, send fewer rows")
        shape = tuple(() if self._is_padded(spec) else tuple(feeds[spec.name].shape[1:]) for spec in self.inputs)
        return Rows(feeds, rows, length, shape)

    def _check_one(self, spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
        name = spec.name
        if array.dtype.name != spec.dtype and not (spec.dtype == "str" and array.dtype.kind == "O"):
            raise RequestError(f"input '{name}' is {datatype_of(array.dtype)}; send {datatype_of(spec.dtype)}")
        if array.ndim != len(spec.shape):
            raise RequestError(f"input '{name}' has shape {list(array.shape)}; send {_shown(spec)}")
        for size, want in zip(array.shape, spec.shape, strict=True):
            if size == 0 or (isinstance(want, int) and size != want):
                raise RequestError(f"input '{name}' has shape {list(array.shape)}; send {_shown(spec)}")
            if isinstance(want, str):
                first, owner = sizes.setdefault(want, (size, name))
                if first != size:
                    raise RequestError(
                        f"input '{name}' has {want} {size}, but input '{owner}' has {first}; make them the same"
                    )

    def _check_range(self, name: str, array: Array | None, stop: int) -> None:
        if array is None or array.dtype.kind not in "iu" or not array.size:
            return
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= stop:
            wrong = low if low < 0 else high
            raise RequestError(f"input '{name}' holds {wrong}; send numbers from 0 to {stop - 1}")

    def batched(self, works: Sequence[Mapping[str, Array]], rows: Sequence[int], length: int) -> dict[str, Array]:
        """The feeds of several requests as one, each padded to ``length``."""
        if len(works) == 1:
            # requests come as views of what was received, at any address
            return {spec.name: np.require(works[0][spec.name], requirements=("C", "A")) for spec in self.inputs}
        feeds: dict[str, Array] = {}
        for spec in self.inputs:
            name = spec.name
            if not self._is_padded(spec):
                feeds[name] = np.concatenate([each[name] for each in works])
                continue
            whole = np.full((sum(rows), length), self._fill[name], works[0][name].dtype)
            start = 0
            for each, count in zip(works, rows, strict=True):
                array = each[name]
                whole[start : start + count, : array.shape[1]] = array
                start += count
            feeds[name] = whole
        return feeds

    def parted(self, outputs: Mapping[str, Array], start: int, rows: int, length: int) -> dict[str, Array]:
        """One request's part of the outputs of a batch: its rows, without the positions that were padded."""
        found: dict[str, Array] = {}
        for spec in self.outputs:
            array = outputs[spec.name]
            if self.batch is not None:
                array = array[start : start + rows]
            if self.padded is not None and self.padded in spec.shape:
                cut = [slice(length if size == self.padded else None) for size in spec.shape]
                array = array[tuple(cut)]
            found[spec.name] = array
        return found

    def _is_padded(self, spec: TensorSpec) -> bool:
        return self.padded is not None and self.padded in spec.shape


def _shown(spec: TensorSpec) -> str:
    return f"[{', '.join(str(size) for size in spec.shape)}], from 1 on"
