"""Everything one run of the demo measured; ``report.json`` and its schema."""

from __future__ import annotations

from typing import Literal

import msgspec

from deployfa.bench import BenchReport
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
    """One bundle: how its edits were placed and what they add at run time."""

    bundle: str
    folded: int
    side_ops: int
    extra_flops_per_token: int
    extra_bytes: int
    graph_bytes: int
    fusion: str


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
