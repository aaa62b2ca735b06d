"""What the bench and its workers say to each other: one JSON object a line."""

from __future__ import annotations

import msgspec

from deployfa.runtimes.runner import TensorSpec

__all__ = [
    "Block",
    "Count",
    "Counted",
    "Failed",
    "Generate",
    "Generated",
    "Memorised",
    "Memory",
    "Open",
    "OpenGenerator",
    "Opened",
    "Prepare",
    "PreparePrompts",
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


class OpenGenerator(msgspec.Struct, tag="open generator", frozen=True, kw_only=True):
    """Load what generates: ``bundle`` of kind ``bundle``; of kind ``torch``, ``model`` and, if not ``None``,
    ``adapter``."""

    label: str
    kind: str
    bundle: str | None
    adapter: str | None
    model: str | None
    target: str | None
    threads: int
    spinning: bool


class PreparePrompts(msgspec.Struct, tag="prepare prompts", frozen=True):
    """Draw ``batch`` prompts of ``prompt`` tokens, ids in [1, vocabulary), and generate ``new`` tokens once."""

    batch: int
    prompt: int
    new: int
    seed: int
    vocabulary: int


class Generate(msgspec.Struct, tag="generate", frozen=True):
    """Time one generation."""


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


class Generated(msgspec.Struct, tag="generated", frozen=True):
    """first_ms: until the first token of every row; ms: until the last one.  sha256: of all tokens, to tell whether two
    contenders generated the same."""

    first_ms: float
    ms: float
    sha256: str


class Memorised(msgspec.Struct, tag="memorised", frozen=True):
    """``None`` where the system does not tell."""

    peak_bytes: int | None


class Counted(msgspec.Struct, tag="counted", frozen=True):
    flops: int | None
    reason: str | None


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The request could not be carried out; the worker lives on."""

    message: str


Request = Open | Prepare | Warm | Run | Memory | Count | OpenGenerator | PreparePrompts | Generate
Reply = Ready | Opened | Prepared | Warmed | Block | Memorised | Counted | Generated | Failed
