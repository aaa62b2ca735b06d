"""``manifest.json``: what a bundle holds and where it came from."""

from __future__ import annotations

from typing import Any

import msgspec

from deployfa.adapter import BaseReference
from deployfa.preprocess import Preprocessing
from deployfa.runtimes.tensorrt.record import EngineRecord
from deployfa.tables import Layout, Member

__all__ = [
    "ENGINES",
    "FORMAT",
    "MANIFEST",
    "AdapterSummary",
    "Candidate",
    "FusedCount",
    "GraphSummary",
    "Manifest",
    "Optimization",
    "Preprocessing",
    "Reference",
    "Slots",
    "Tables",
    "Tensor",
]

FORMAT = "deployfa-bundle/1"
MANIFEST = "manifest.json"
#: The folder of a bundle's engines.
ENGINES = "engines"


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output of the graph; a dynamic dimension is its name."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The graph file and its signature."""

    file: str
    opset: int
    inputs: list[Tensor]
    outputs: list[Tensor]
    bytes: int


class AdapterSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter that was placed; the whole of it lies beside in ``adapter.safetensors``."""

    method: str
    sites: int
    parameters: int
    module_parameters: int
    training: dict[str, Any]


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One way to fuse the graph: its median latency per shape, or why it was not taken."""

    name: str
    median_ms: dict[str, float] = {}
    error: float | None = None
    refused: str | None = None


class Optimization(msgspec.Struct, frozen=True, kw_only=True):
    """Which fusion was chosen and what else was tried."""

    asked: str
    chosen: str
    shapes: list[str]
    threads: int
    tried: list[Candidate]


class FusedCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many of one fused operator a session runs: of the base graph, and with the adapter in it."""

    base: int
    adapted: int


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """What the stored reference outputs are, and the noise they are judged by.

    ``noise`` is the normwise relative error of float32 against float64 in the same model on the same inputs, and
    ``noise_max_abs`` that of a logit: the largest of several runs (``deployfa.parity.noise``).
    """

    file: str
    kind: str
    rows: int
    noise: float
    noise_max_abs: float


class Tables(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose every row of a batch runs its own adapter.  ``adapters[i]`` is row i; row 0, ``base``, the base.

    ``inputs``: whether the tables are graph inputs, to be bound from ``file``, or constants of the graph.
    ``replaced``: module → parameter → shape, of what the first adapter replaces: the base graph is found by it again.
    """

    layout: Layout
    adapters: list[Member]
    inputs: bool
    file: str | None = None
    replaced: dict[str, dict[str, list[int]]] = {}


class Slots(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose adapter is a set of inputs with defaults: without one it is the base.

    ``file``: the adapter it was exported with as an ``.onnx_adapter``; ``idle_branch``: whether the base graph lies in
    it as a branch of its own, which runs while no adapter is active; ``active``: how the other branch was fused, as
    the manifest's own ``optimization`` is the idle one's.  ``labels`` and ``idle``: of the base, and its stored
    answers.  ``exact``: whether, at export, idle answers were those of the base graph bit for bit.
    """

    layout: Layout
    file: str
    idle_branch: bool
    labels: list[str]
    active: Optimization
    idle: Reference
    exact: bool


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Format version, fingerprints, plan, signature, versions, sha256 of every file, and the summaries once run.

    ``fusions``: fused operator (see ``deployfa.runtimes.fused_operators``) → how many before and after the adapter,
    both graphs fused as ``optimization.chosen`` says, with slots as ``slots.active.chosen``; ``None`` in a bundle of an
    older deployfa.
    ``tables``: the adapters of a pack, ``slots``: the inputs that one adapter fills.  ``engines``: what was compiled.
    """

    format: str
    target: str
    base: BaseReference
    adapter: AdapterSummary
    plan: dict[str, Any]
    graph: GraphSummary
    optimization: Optimization
    fusions: dict[str, FusedCount] | None = None
    preprocessing: Preprocessing
    reference: Reference
    labels: list[str]
    versions: dict[str, str]
    files: dict[str, str]
    warnings: list[str] = []
    tables: Tables | None = None
    slots: Slots | None = None
    engines: list[EngineRecord] = []
    parity: dict[str, Any] | None = None
    bench: dict[str, Any] | None = None
