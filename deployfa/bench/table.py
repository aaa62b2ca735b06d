"""A bench as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deployfa.bench.results import BenchReport, Ceiling, Result, SpinningState
from deployfa.bench.statistics import minimum_samples

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["REFUSED", "figure", "render"]

REFUSED = "–"
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def render(report: BenchReport) -> RenderableType:
    """Latency at each shape, one table a setting of spinning; what does not depend on shape; footnotes; warnings."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_latency(report, spinning) for spinning in report.settings.spinning]
    parts.append(_contenders(report))
    parts += [Text(note, style="dim") for note in _footnotes(report)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    return Group(*parts)


def _latency(report: BenchReport, spinning: SpinningState) -> Table:
    from rich.table import Table

    threads = report.settings.threads
    table = Table(title=f"Latency, {threads} thread{'s' if threads > 1 else ''}, spinning {spinning}")
    table.add_column("shape", no_wrap=True)
    table.add_column("contender")
    for name in (*(f"{each} (ms)" for each in _QUANTILES), "ratio [95 % interval]"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for name in ("throughput (items/s)", "GFLOP/s", "memory (MB)", "size (MB)", "samples"):
        table.add_column(name, justify="right")
    memory = {each.label: each.peak_memory_bytes for each in report.contenders}
    size = {each.label: each.size_bytes for each in report.contenders}
    ceilings = {(each.batch, each.sequence): each for each in report.ceilings if each.spinning == spinning}
    results = [result for result in report.results if result.spinning == spinning]
    for index, result in enumerate(results):
        shape = (result.batch, result.sequence)
        table.add_row(
            f"{result.batch}x{result.sequence}",
            result.contender,
            *(figure(value) for value in (result.p50_ms, result.p90_ms, result.p95_ms, result.p99_ms)),
            _ratio(result),
            result.verdict or REFUSED,
            figure(result.items_per_s),
            figure(result.gflop_per_s),
            _megabytes(memory[result.contender]),
            _megabytes(size[result.contender]),
            str(result.samples),
        )
        following = results[index + 1] if index + 1 < len(results) else None
        if following is None or (following.batch, following.sequence) != shape:
            if shape in ceilings:
                table.add_row(*_ceiling_row(ceilings[shape]), style="dim")
            table.add_section()
    return table


def _ceiling_row(each: Ceiling) -> Sequence[str]:
    name = f"bare MatMul ({each.m}, {each.k}) ({each.k}, {each.n})"
    speed, samples = figure(each.gflop_per_s), str(each.samples)
    return [f"{each.batch}x{each.sequence}", name, figure(each.p50_ms), "", "", "", "", "", "", speed, "", "", samples]


def _contenders(report: BenchReport) -> Table:
    from rich.table import Table

    table = Table(title="Cold start, fastest to slowest of the launches")
    table.add_column("contender")
    for name in ("process (ms)", "library (ms)", "session (ms)", "first inference (ms)"):
        table.add_column(name, justify="right")
    for each in report.contenders:
        spans = (each.start_ms, each.import_ms, each.session_ms, each.first_inference_ms)
        table.add_row(each.label, *(f"{figure(min(span))} to {figure(max(span))}" for span in spans))
    return table


def _footnotes(report: BenchReport) -> list[str]:
    machine, settings = report.machine, report.settings
    targets = ", ".join(dict.fromkeys(each.target for each in report.contenders))
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    load = "unknown" if machine.load_1min is None else f"{machine.load_1min:.2f}"
    notes = [
        f"on {targets}: {machine.cpu}, {machine.cores} cores, load {load} before; Python {machine.python}, {versions}",
        f"{settings.launches} launches a contender, rounds interleaved, seed {settings.seed}; "
        f"ratio: of the medians round by round, to {report.contenders[0].label}",
    ]
    lacking = [name for name in _QUANTILES if any(f"{name}_ms" in result.refused for result in report.results)]
    if lacking:
        needs = ", ".join(f"{name} needs {minimum_samples(_QUANTILES[name])}" for name in lacking)
        notes.append(f"{REFUSED} too few samples: {needs}")
    others = {
        f"{REFUSED} {result.contender}, {name}: {reason}"
        for result in report.results
        for name, reason in result.refused.items()
        if name in {"flops", "ratio", "verdict"}
    }
    return notes + sorted(others)


def _ratio(result: Result) -> str:
    if result.verdict == "reference":
        return "1"
    if result.ratio is None or result.ratio_low is None or result.ratio_high is None:
        return REFUSED
    return f"{result.ratio:.3f} [{result.ratio_low:.3f}, {result.ratio_high:.3f}]"


def _megabytes(count: int | None) -> str:
    return REFUSED if count is None else figure(count / 1e6)


def figure(value: float | None) -> str:
    """Three or more significant digits: 0.123, 1.23, 12.3, 123, 1234."""
    if value is None:
        return REFUSED
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"
