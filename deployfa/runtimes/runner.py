"""The seam between graphs and what executes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from deployfa.edits import Array

__all__ = ["Runner", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, numpy dtype name, and shape; a dynamic dimension is its name, e.g. ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Runner(Protocol):
    """Something that turns named input arrays into named output arrays."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One inference.  Raises ``RuntimeTargetError`` on a missing, extra, or misshapen feed."""
        ...
