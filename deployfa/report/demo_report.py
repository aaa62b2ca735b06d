"""Everything one run of the demo measured; ``report.json`` and its schema."""

from __future__ import annotations

from typing import Literal

import msgspec

from deployfa.bench import BenchReport
from deployfa.bundle.manifest import FusedCount
from deployfa.metrics import Scores
from deployfa.parity import ParityReport

__all__ = ["DemoReport", "MethodResult", "PlacementCount", "Sentence"]


class MethodResult(msgspec.Struct, frozen=True, kw_only=True):
    """One trained method.  Scores are fractions in [0, 1], per domain; ``movies`` is the training domain's test set."""

    method: str
    trainable_parameters: int
    seconds: float
    scores: dict[str, Scores]


class PlacementCount(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle: how its edits were placed and what they add at run time.  ``fusions`` is the manifest's."""

    bundle: str
    folded: int
    side_ops: int
    extra_flops_per_token: int
    extra_bytes: int
    graph_bytes: int
    fusion: str
    fusions: dict[str, FusedCount] | None = None

    @property
    def fusion_kept(self) -> str:
        """``ort, 25/31 kept``, of the base graph's fused operators; without the count from an older deployfa."""
        if self.fusions is None:
            return self.fusion
        before = sum(count.base for count in self.fusions.values())
        kept = sum(min(count.base, count.adapted) for count in self.fusions.values())
        return f"{self.fusion}, {kept}/{before} kept"


class Sentence(msgspec.Struct, frozen=True, kw_only=True):
    """The sentence that was answered at the end."""

    text: str
    label: str
    score: float


class DemoReport(msgspec.Struct, frozen=True, kw_only=True):
    """``contenders`` of ``bench`` are ``base`` (what the ratios refer to), ``folded`` and ``side-op``, by label."""

    format: Literal["deployfa-demo/1"] = "deployfa-demo/1"
    created: str
    model: str
    seed: int
    train_rows: int
    methods: list[MethodResult]
    bundles: list[PlacementCount]
    parity: dict[str, ParityReport]
    bench: BenchReport
    sentence: Sentence
    stage_seconds: dict[str, float]
    versions: dict[str, str]
