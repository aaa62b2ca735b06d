"""The precisions that an engine can have, each by what it does to the graph: an engine takes its types from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from deployfa.edits import Array

__all__ = ["PRECISIONS", "Lowered", "lower"]

Feeds = Sequence[Mapping[str, Array]]


@dataclass(frozen=True, eq=False)
class Lowered:
    """A typed graph.

    low, kept: operator → how many nodes compute in ``precision``, and in float32 still.  rounding: how much coarser
    than float32 it rounds, which is how much more noise it may have; ``None`` where no such bound holds.
    """

    model: ir.Model
    precision: str
    low: dict[str, int]
    kept: dict[str, int]
    rounding: float | None


def lower(model: ir.Model, precision: str, feeds: Feeds) -> Lowered:
    """``model`` in ``precision``, a key of ``PRECISIONS``; ``feeds`` are what an int8 graph is calibrated with."""
    return PRECISIONS[precision](model, feeds)


def _float32(model: ir.Model, feeds: Feeds) -> Lowered:
    return Lowered(model, "fp32", {}, {}, 1.0)


PRECISIONS: dict[str, Callable[[ir.Model, Feeds], Lowered]] = {"fp32": _float32}
