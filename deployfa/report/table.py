"""The demo's end in a terminal: one table, at most 120 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deployfa.report.demo_report import DemoReport
from deployfa.report.figures import (
    DASH,
    domains,
    figure,
    percent,
    plain,
    ratio,
    scientific,
    shape,
    shifted,
    shifted_mean,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["render", "sections"]

_STYLES = {"pass": "green", "FAIL": "bold red", "slower": "yellow", "faster": "green"}


def render(report: DemoReport) -> list[RenderableType]:
    """Methods, parity, latency and bundles in the sections of one table; then the answer and the bench's warnings."""
    from rich.table import Table
    from rich.text import Text

    shown = [section for section in sections(report) if len(section) > 1]
    columns = max((len(row) for section in shown for row in section), default=1)
    title = f"deployfa demo: {plain(report.model)}, {report.train_rows:,} training rows, seed {report.seed}"
    table = Table(title=Text(title), show_header=False, padding=(0, 1), title_justify="left")
    table.add_column(overflow="fold")
    for _ in range(columns - 1):
        table.add_column(justify="right", overflow="fold")
    for head, *rows in shown:
        table.add_row(*(Text(cell, style="bold") for cell in head))
        for row in rows:
            table.add_row(*(Text(plain(cell), style=_STYLES.get(cell, "")) for cell in row))
        table.add_section()
    answer = report.sentence
    closing = f"“{plain(answer.text)}” → {plain(answer.label)} ({answer.score:.3f})"
    warnings = [Text(f"warning: {plain(warning)}", style="yellow") for warning in report.bench.warnings]
    failed = [
        Text(f"parity FAILED for {plain(name)}: {plain(found.reason)}", style="bold red")
        for name, found in report.parity.items()
        if not found.passed
    ]
    return [table, Text(closing), *failed, *warnings]


def sections(report: DemoReport) -> Iterator[list[Sequence[str]]]:
    """Each a heading row, then its rows; every heading names its unit."""
    names, away = domains(report), shifted(report)
    yield [
        ("bal. accuracy (%)", "parameters", *map(plain, names), "shifted mean"),
        *(
            (
                each.method,
                f"{each.trainable_parameters:,}",
                *(percent(each.scores[name].balanced_accuracy if name in each.scores else None) for name in names),
                percent(shifted_mean(each, away)),
            )
            for each in report.methods
        ),
    ]
    yield [
        ("bundle", "edits folded", "side ops", "FLOP / token", "extra bytes", "graph (MB)", "fusion"),
        *(
            (
                each.bundle,
                str(each.folded),
                str(each.side_ops),
                f"{each.extra_flops_per_token:,}",
                f"{each.extra_bytes:,}",
                figure(each.graph_bytes / 1e6),
                each.fusion_kept,
            )
            for each in report.bundles
        ),
    ]
    yield [
        ("parity", "error / ‖truth‖", "error / noise", "limit", "label flips", "rows", "verdict"),
        *(
            (
                name,
                scientific(found.stages[-1].error, 1) if found.stages else DASH,
                figure(found.stages[-1].noise_ratio) if found.stages else DASH,
                f"{found.limit:g}",
                str(found.stages[-1].flips) if found.stages else DASH,
                f"{found.rows:,}",
                "pass" if found.passed else "FAIL",
            )
            for name, found in report.parity.items()
        ),
    ]
    settings = report.bench.settings.spinning
    for spinning in settings:
        name = "latency" if len(settings) == 1 else f"spinning {spinning}"
        yield [
            (name, "p50 (ms)", "p95 (ms)", "ratio", "95 % interval", "samples", "verdict"),
            *(
                (
                    f"{shape(each)} {each.contender}",
                    figure(each.p50_ms),
                    figure(each.p95_ms),
                    *_ratio_cells(ratio(each)),
                    f"{each.samples:,}",
                    each.verdict or DASH,
                )
                for each in report.bench.results
                if each.spinning == spinning
            ),
        ]


def _ratio_cells(text: str) -> tuple[str, str]:
    """``1.042 [1.021, 1.066]`` in two columns."""
    estimate, _, interval = text.partition(" ")
    return estimate, interval.strip("[]")
