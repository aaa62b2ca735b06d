"""What timing generation found, and as a table.  ``msgspec.json.schema(GenerationBench)`` is the published schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from deployfa.bench.machine import Machine
from deployfa.bench.statistics import Verdict
from deployfa.bench.table import figure

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Generating", "GenerationBench", "GenerationResult", "GenerationSettings", "Ratio", "render"]


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All greedy, all prompts of one batch of one length, and no token ends an answer."""

    threads: int
    spinning: bool
    launches: int
    rounds: int
    new_tokens: int
    seed: int
    vocabulary: int


class Generating(msgspec.Struct, frozen=True, kw_only=True):
    """One way of generating; the lists hold one figure a launch."""

    label: str
    kind: Literal["bundle", "torch"]
    target: str
    bundle: str | None
    peak_memory_bytes: int | None
    start_ms: list[float]
    import_ms: list[float]
    session_ms: list[float]


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times the first one's time it takes, round by round, with its 95 % interval; no verdict follows from one
    launch."""

    estimate: float
    low: float
    high: float
    verdict: Verdict | None


class GenerationResult(msgspec.Struct, frozen=True, kw_only=True):
    """One contender at one batch and length of prompt; medians.

    ttft_ms: until the first token of every row is there.  token_ms: of a step after that, a token a row;
    tokens_per_second: of all rows together.  A ratio that the samples do not support is ``None``, and ``refused`` says
    why.  same_tokens: whether it generated what the first contender did.
    """

    contender: str
    batch: int
    prompt_tokens: int
    samples: int
    ttft_ms: float
    token_ms: float
    tokens_per_second: float
    ttft_ratio: Ratio | None
    token_ratio: Ratio | None
    same_tokens: bool
    refused: str | None = None


class GenerationBench(msgspec.Struct, frozen=True, kw_only=True):
    """contenders[0] is the one that the ratios refer to."""

    format: Literal["deployfa-generation-bench/1"] = "deployfa-generation-bench/1"
    machine: Machine
    settings: GenerationSettings
    contenders: list[Generating]
    results: list[GenerationResult]
    warnings: list[str]


def render(report: GenerationBench) -> RenderableType:
    """One row a contender, batch and length; footnotes; warnings."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    settings, machine = report.settings, report.machine
    table = Table(title=f"Generation, {settings.new_tokens} new tokens, {settings.threads} threads, greedy")
    table.add_column("batch x prompt", no_wrap=True)
    table.add_column("contender")
    columns = (
        "first token (ms)",
        "ratio [95 % interval]",
        "tokens/s",
        "a step (ms)",
        "ratio [95 % interval]",
        "samples",
    )
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("same tokens")
    for index, each in enumerate(report.results):
        table.add_row(
            f"{each.batch}x{each.prompt_tokens}",
            each.contender,
            figure(each.ttft_ms),
            ratio_text(each.ttft_ratio, each),
            figure(each.tokens_per_second),
            figure(each.token_ms),
            ratio_text(each.token_ratio, each),
            str(each.samples),
            "yes" if each.same_tokens else "no",
            end_section=(index + 1) % len(report.contenders) == 0,
        )
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    notes = [
        f"{machine.cpu}, {machine.cores} cores; Python {machine.python}, {versions}",
        f"{settings.launches} launches a contender, {settings.rounds} rounds each, interleaved, seed {settings.seed}; "
        f"ratio: of the times round by round, to {report.contenders[0].label}",
        *sorted({each.refused for each in report.results if each.refused}),
    ]
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    return Group(table, *(Text(note, style="dim") for note in notes), *warnings)


def ratio_text(ratio: Ratio | None, result: GenerationResult) -> str:
    """``0.412 [0.402, 0.423]``; 1 for what ratios refer to, a dash where there is none."""
    if ratio is None:
        return "–" if result.refused else "1"
    return f"{ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
