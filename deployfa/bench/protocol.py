"""What the bench and its workers say to each other: one JSON object a line."""

from __future__ import annotations

import msgspec

from deployfa.runtimes.runner import TensorSpec

__all__ = [
    "Block",
    "Count",
    "Counted",
    "Failed",
    "Memorised",
    "Memory",
    "Open",
    "Opened",
    "Prepare",
    "Prepared",
    "Ready",
    "Reply",
    "Request",
    "Run",
    "Warm",
    "Warmed",
]


class Open(msgspec.Struct, tag="open", frozen=True, kw_only=True):
    """Load a contender.  inputs: those of a graph beside it, for a module, which cannot tell its own."""

    label: str
    kind: str
    graph: str | None
    adapter: str | None
    model: str | None
    target: str
    threads: int
    spinning: bool
    inputs: tuple[TensorSpec, ...] = ()
    adapters: int = 0
    fleet: str | None = None
    bundle: str | None = None
    engine: str | None = None


class Prepare(msgspec.Struct, tag="prepare", frozen=True):
    """Make feeds and run for the first time."""

    batch: int
    sequence: int
    seed: int
    vocabulary: int


class Warm(msgspec.Struct, tag="warm", frozen=True):
    """Run until the median stops moving, for ``max_ms`` at most."""

    max_ms: float


class Run(msgspec.Struct, tag="run", frozen=True):
    """One block: ``count`` timed runs."""

    count: int


class Memory(msgspec.Struct, tag="memory", frozen=True):
    """Ask for the peak so far."""


class Count(msgspec.Struct, tag="count", frozen=True):
    """Count the operations at the prepared shape."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker has started."""


class Opened(msgspec.Struct, tag="opened", frozen=True, kw_only=True):
    """import_ms: loading the runtime's library; session_ms: making the session, or the module."""

    import_ms: float
    session_ms: float
    inputs: tuple[TensorSpec, ...]


class Prepared(msgspec.Struct, tag="prepared", frozen=True):
    first_ms: float


class Warmed(msgspec.Struct, tag="warmed", frozen=True):
    """steady: two windows in a row agreed; median_ms: of the last one."""

    median_ms: float
    runs: int
    steady: bool


class Block(msgspec.Struct, tag="block", frozen=True):
    ms: list[float]


class Memorised(msgspec.Struct, tag="memorised", frozen=True):
    """``None`` where the system does not tell."""

    peak_bytes: int | None


class Counted(msgspec.Struct, tag="counted", frozen=True):
    flops: int | None
    reason: str | None


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The request could not be carried out; the worker lives on."""

    message: str


Request = Open | Prepare | Warm | Run | Memory | Count
Reply = Ready | Opened | Prepared | Warmed | Block | Memorised | Counted | Failed
