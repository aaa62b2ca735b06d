"""The stored float64 reference at another shape: its rows, padded and batched as a contender is timed.

A row's answer does not depend on what is padded to it or batched with it, so the truth of a row is its truth at every
shape; and ``torch.compile`` or an engine is held against it in just the code that is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deployfa.bench import Shape
from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.parity.cases import Case, read_cases
from deployfa.parity.measures import LIMIT, normwise, unmasked

__all__ = ["LOW_LIMIT", "Batches", "batches", "limit_of", "rows_of"]

#: How many times PyTorch's own error a contender may have in 16 bits.
LOW_LIMIT = 3.0
#: How much coarser than float32 a type rounds: 24 bits of significand against 11 and 8.
_COARSER = {"fp32": 1.0, "fp16": 2.0**13, "bf16": 2.0**16}
_MASK = "attention_mask"


@dataclass(frozen=True, eq=False)
class Batches:
    """Feeds of one shape; of each, which rows of ``truth`` (rows, labels) its first rows are; the rest are repeats."""

    feeds: list[dict[str, Array]]
    rows: list[list[int]]
    truth: Array

    def error(self, answer: Callable[[dict[str, Array]], Array]) -> float:
        """Normwise relative error of ``answer`` (feeds → (batch, labels)); infinite for what is no finite number."""
        found = np.concatenate(
            [answer(feeds)[: len(rows)].astype(np.float64) for feeds, rows in zip(self.feeds, self.rows, strict=True)]
        )
        wanted = self.truth[np.concatenate(self.rows)]
        found, wanted = unmasked(found, wanted)
        return normwise(found, wanted) if np.isfinite(found).all() else float("inf")


def rows_of(bundle: Bundle) -> list[Case]:
    """The stored reference of ``bundle``, every row once and alone, without padding."""
    found: dict[bytes, Case] = {}
    for case in read_cases(bundle.reference):
        assert case.truth is not None  # read_cases refuses a case without
        for number, mask in enumerate(case.feeds[_MASK]):
            length = int(mask.sum())
            feeds = {
                name: array[number : number + 1] if array.ndim == 1 else array[number : number + 1, :length]
                for name, array in case.feeds.items()
            }
            key = b"".join(feeds[name].tobytes() for name in sorted(feeds))
            found.setdefault(key, Case(feeds, case.truth[number : number + 1]))
    return list(found.values())


def batches(rows: Sequence[Case], shape: Shape) -> Batches:
    """Those of ``rows`` (each (1, length)) that are no longer than ``shape``, batched and padded to it."""
    fitting = [row for row in rows if row.feeds[_MASK].shape[1] <= shape.sequence]
    assert fitting, f"no row of the reference is as short as {shape.sequence} tokens"
    chunks = [list(range(start, len(fitting)))[: shape.batch] for start in range(0, len(fitting), shape.batch)]
    feeds = []
    for chunk in chunks:
        filled = np.resize(chunk, shape.batch)
        feeds.append(_stacked([fitting[number].feeds for number in filled], shape.sequence))
    return Batches(feeds, chunks, np.concatenate([row.truth for row in fitting if row.truth is not None]))


def limit_of(precision: str, pytorch: float, noise: float, *, is_pytorch: bool) -> float:
    """The error that a contender may have.

    pytorch: the error of PyTorch eager in ``precision`` on the same rows at the same shape; noise: float32's, stored in
    the bundle.  In float32 either is the model's own noise.  PyTorch eager is what the others are measured by, so it is
    held against the stored noise alone, as much more of it as its type is coarser.
    """
    if is_pytorch:
        return LIMIT * noise * _COARSER[precision]
    return LIMIT * max(pytorch, noise) if precision == "fp32" else LOW_LIMIT * pytorch


def _stacked(rows: Sequence[Mapping[str, Array]], sequence: int) -> dict[str, Array]:
    def wide(array: Array) -> Array:
        # what stands where the mask is 0 does not matter
        return array if array.ndim == 1 else np.pad(array, ((0, 0), (0, sequence - array.shape[1])))

    return {name: np.concatenate([wide(row[name]) for row in rows]) for name in rows[0]}
