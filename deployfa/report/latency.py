"""The page's section on latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deployfa.bench import Ceiling, Result
from deployfa.report.demo_report import DemoReport
from deployfa.report.figures import DASH, figure, ratio, shape
from deployfa.report.markup import Html, drawn, table, tag

__all__ = ["latency"]


def latency(report: DemoReport, plots: Mapping[str, Html]) -> Html:
    """Ratios with their intervals, medians, every percentile that the samples support, cold start."""
    bench, settings = report.bench, report.bench.settings
    reference = bench.contenders[0].label if bench.contenders else "the reference"
    threads = f"{settings.threads} thread{'s' if settings.threads != 1 else ''}"
    text = (
        f"Every contender ran in a process of its own, {settings.launches} launches each, in interleaved rounds of "
        f"about {settings.block_ms:g} ms in random order, with {threads}, on random tokens. The ratio compares medians "
        f"with {reference} round by round; where its interval covers 1 the two cannot be told apart."
    )
    head = ["shape", "contender", "p50 (ms)", "p90 (ms)", "p95 (ms)", "p99 (ms)"]
    head += ["ratio [95 % interval]", "verdict", "items / s", "GFLOP / s", "samples"]
    tables = [
        table(f"Latency by shape (batch x sequence), spinning {on}", head, _timings(report, on), words=(1, 7))
        for on in settings.spinning
    ]
    cold = [
        [each.label, *map(_span, (each.start_ms, each.import_ms, each.session_ms, each.first_inference_ms))]
        + [DASH if size is None else figure(size / 1e6) for size in (each.peak_memory_bytes, each.size_bytes)]
        for each in bench.contenders
    ]
    cold_head = ["contender", "process (ms)", "library (ms)", "session (ms)", "first inference (ms)"]
    cold_head += ["peak memory (MB)", "size (MB)"]
    refused = sorted({reason for each in bench.results for reason in each.refused.values()})
    return tag(
        "section",
        tag("h2", "What does it cost?"),
        tag("p", text),
        [tag("p", f"Warning: {warning}", class_="note") for warning in bench.warnings],
        drawn(plots, "ratios", f"Left of the line is faster than {reference}, right of it slower."),
        drawn(plots, "latency", "Bars are medians (p50); whiskers go from the fastest run to p95."),
        tables,
        [tag("p", f"{DASH} {reason}", class_="foot") for reason in refused],
        tag(
            "details",
            tag("summary", "Cold start, memory and size"),
            table("Fastest to slowest of the launches", cold_head, cold),
        ),
    )


def _timings(report: DemoReport, spinning: str) -> list[list[str]]:
    rows: list[list[str]] = []
    results = [each for each in report.bench.results if each.spinning == spinning]
    bare = {(each.batch, each.sequence): each for each in report.bench.ceilings if each.spinning == spinning}
    for index, each in enumerate(results):
        rows.append(_timing(each))
        following = results[index + 1] if index + 1 < len(results) else None
        if following is None or shape(following) != shape(each):
            found = bare.get((each.batch, each.sequence))
            rows += [_bare(found)] if found is not None else []
    return rows


def _timing(each: Result) -> list[str]:
    spread = [figure(value) for value in (each.p50_ms, each.p90_ms, each.p95_ms, each.p99_ms)]
    speeds = [figure(each.items_per_s), figure(each.gflop_per_s), f"{each.samples:,}"]
    return [shape(each), each.contender, *spread, ratio(each), each.verdict or DASH, *speeds]


def _bare(each: Ceiling) -> list[str]:
    name = f"bare MatMul ({each.m}, {each.k}) ({each.k}, {each.n})"
    row = [f"{each.batch}x{each.sequence}", name, figure(each.p50_ms), "", "", "", "", "", ""]
    return [*row, figure(each.gflop_per_s), f"{each.samples:,}"]


def _span(values: Sequence[float]) -> str:
    return f"{figure(min(values))} to {figure(max(values))}" if values else DASH
