"""What a bench found.  ``msgspec.json.schema(BenchReport)`` is the published schema."""

from __future__ import annotations

from typing import Literal

import msgspec

from deployfa.bench.machine import Machine
from deployfa.bench.statistics import Verdict

__all__ = ["BenchReport", "Ceiling", "ContenderReport", "Result", "Settings", "SpinningState"]

SpinningState = Literal["on", "off"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured.  What is timed is ``Runner.run``: numpy arrays in, numpy arrays out."""

    threads: int
    spinning: list[SpinningState]
    launches: int
    min_samples: int
    max_seconds_per_shape: float
    block_ms: float
    seed: int
    vocabulary: int


class ContenderReport(msgspec.Struct, frozen=True, kw_only=True):
    """What does not depend on the shape.  target: where it ran, ``torch-cpu`` for a module.  The lists hold one figure
    a launch, in the order of launching.

    start_ms: process and Python; import_ms: the runtime's library; session_ms: making the session, or the module;
    first_inference_ms: the first run of all, at the first shape.  size_bytes: the graph with its external data.
    peak_memory_bytes: of the worker, over all shapes and launches, libraries included.
    """

    label: str
    kind: str
    target: str = "onnxruntime-cpu"
    graph: str | None
    bundle: str | None
    size_bytes: int | None
    peak_memory_bytes: int | None
    start_ms: list[float]
    import_ms: list[float]
    session_ms: list[float]
    first_inference_ms: list[float]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One contender at one shape with one setting of spinning.

    A figure that the samples do not support is ``None`` and ``refused`` says why, by the figure's name.  ratio: how
    many times the first contender's median this one takes, compared round by round (so not exactly the quotient of the
    two p50_ms), with its 95 % interval.  flops: of one inference;
    gflop_per_s: flops over the median.
    """

    contender: str
    batch: int
    sequence: int
    spinning: SpinningState
    samples: int
    rounds: int
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mean_ms: float
    min_ms: float
    items_per_s: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    verdict: Verdict | None
    flops: int | None
    gflop_per_s: float | None
    refused: dict[str, str]


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """A bare float32 MatMul (m, k) (k, n) with m = batch * sequence, in the same rounds with the same threads."""

    batch: int
    sequence: int
    spinning: SpinningState
    m: int
    k: int
    n: int
    samples: int
    p50_ms: float | None
    gflop_per_s: float | None


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """contenders[0] is the one that the ratios refer to."""

    format: Literal["deployfa-bench/1"] = "deployfa-bench/1"
    machine: Machine
    settings: Settings
    contenders: list[ContenderReport]
    results: list[Result]
    ceilings: list[Ceiling]
    warnings: list[str]
