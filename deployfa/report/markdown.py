"""A demo's figures as Markdown: what stands in the README."""

from __future__ import annotations

from collections.abc import Sequence

from deployfa.report.demo_report import DemoReport
from deployfa.report.figures import plain
from deployfa.report.table import sections

__all__ = ["render"]


def render(report: DemoReport) -> str:
    """One Markdown table a section, then what it was measured on."""
    machine = report.bench.machine
    known = [f"{name} {report.versions[name]}" for name in ("torch", "onnxruntime") if name in report.versions]
    minutes = sum(report.stage_seconds.values()) / 60
    spinning = " and ".join(report.bench.settings.spinning)
    closing = (
        f"{plain(report.model)}, {report.train_rows:,} training sentences, seed {report.seed}; {plain(machine.cpu)}, "
        f"{machine.cores} cores, {report.bench.settings.threads} threads, spinning {spinning}; {', '.join(known)}; "
        f"the whole demo took {minutes:.1f} minutes. Latency ratios are to the base model without an adapter."
    )
    return "\n\n".join([*(_table(rows) for rows in sections(report) if len(rows) > 1), closing])


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [_row(head), "|".join(["", "---", *["---:"] * (len(head) - 1), ""]), *map(_row, body)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(plain(cell).replace("|", "\\|") for cell in cells) + " |"
