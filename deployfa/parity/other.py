"""Another adapter than the one that a bundle brings: in its slots, or one of many in a pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array

__all__ = ["Other"]


@dataclass(frozen=True, eq=False)
class Other:
    """``name``: what a report calls it; ``adapter``: what its truth is computed of; ``labels``: what its answers mean,
    empty if nobody said; ``base``: what PyTorch's model is checked against, unless ``allow_mismatch``.

    ``slot``: what goes into the slots of a bundle, an ``.onnx_adapter`` file or a row; ``row``: its number in a pack.
    """

    name: str
    adapter: Adapter
    labels: tuple[str, ...]
    base: BaseReference
    slot: Path | Mapping[str, Array] | None = None
    row: int | None = None
    allow_mismatch: bool = False
