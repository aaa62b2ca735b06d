"""What is compared, and at which sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deployfa.errors import InputError
from deployfa.runtimes.targets import DEFAULT_TARGET, check_target

__all__ = ["Contender", "Shape", "check_contenders"]


@dataclass(frozen=True, order=True)
class Shape:
    """``batch`` items of ``sequence`` tokens each; graphs without a sequence ignore the second."""

    batch: int
    sequence: int = 1

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``8x128`` → batch 8, sequence 128; ``8`` → batch 8.  Raises ``InputError`` on anything else."""
        match = re.fullmatch(r"\s*(\d+)(?:\s*[x×]\s*(\d+))?\s*", text)
        shape = cls(int(match[1]), int(match[2] or 1)) if match else None
        if shape is None or shape.batch < 1 or shape.sequence < 1:
            raise InputError(f"'{text}' is not a shape; write BATCHxSEQUENCE, such as 8x128")
        return shape

    def __str__(self) -> str:
        return f"{self.batch}x{self.sequence}"


@dataclass(frozen=True)
class Contender:
    """One way of computing the same thing.

    kind ``onnx`` needs ``graph``; kind ``torch`` needs ``adapter``, which is run unfolded on ``model``, or on the base
    that it names itself.  bundle: where the graph lies, when it lies in one.  target: what the graph runs on, of
    ``deployfa.runtimes.targets``; a module runs in PyTorch on the CPU.  engine: of the bundle, for a target that runs
    one.  adapters: how many a pack holds, of which a batch then mixes as many as it has rows; fleet: the file of its
    tables, if they are inputs of the graph.
    """

    label: str
    kind: Literal["onnx", "torch"] = "onnx"
    graph: Path | None = None
    adapter: Path | None = None
    model: str | None = None
    bundle: Path | None = None
    target: str = DEFAULT_TARGET
    adapters: int = 0
    fleet: Path | None = None
    engine: str | None = None


def check_contenders(contenders: list[Contender]) -> None:
    """Raise ``InputError`` on an empty list, a label used twice, or files that are not there."""
    if not contenders:
        raise InputError("nothing to bench; pass at least one contender")
    labels = [contender.label for contender in contenders]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(f"two contenders are called '{twice}'; give each its own label")
    for contender in contenders:
        check_target(contender.target)
        if contender.kind == "onnx" and (contender.graph is None or not contender.graph.is_file()):
            raise InputError(f"contender '{contender.label}' has no graph at '{contender.graph}'; pass an .onnx file")
        if contender.kind == "torch" and contender.adapter is None:
            raise InputError(f"contender '{contender.label}' runs in PyTorch and has no adapter; pass its adapter file")
        if contender.adapter is not None and not contender.adapter.exists():
            raise InputError(f"contender '{contender.label}' has no adapter at '{contender.adapter}'; check the path")
