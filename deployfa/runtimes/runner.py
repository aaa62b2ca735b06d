"""The seam between graphs and what executes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from deployfa.edits import Array

__all__ = ["Runner", "Spinning", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, numpy dtype name, and shape; a dynamic dimension is its name, e.g. ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


#: Whether idle threads of a runtime keep polling: yes, no, or for as long as the gap between two operators.
Spinning = bool | Literal["brief"]


class Runner(Protocol):
    """Something that turns named input arrays into named output arrays."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One inference.  Raises ``RuntimeTargetError`` on a missing, extra, or misshapen feed."""
        ...
