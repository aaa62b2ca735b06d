"""A run of load as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployfa.bench.machine import Machine
from deployfa.bench.statistics import minimum_samples
from deployfa.bench.table import REFUSED, figure
from deployfa.load.discovery import ServerInfo
from deployfa.load.report import QUANTILES, Latency, LoadReport, LoadSettings, RateReport

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["render", "render_rate"]


def render(report: LoadReport) -> RenderableType:
    """Counts, latency, footnotes."""
    from rich.console import Group
    from rich.text import Text

    notes = [f"latency from the intended send time, of the {report.ok:,} answered; interval: 95 %, of this run only"]
    if report.refused:
        needs = ", ".join(f"{name} needs {minimum_samples(QUANTILES[name]):,}" for name in report.refused)
        notes.append(f"{REFUSED} too few answers: {needs}")
    generator = report.generator
    notes.append(
        f"generator: {generator.event_loop}, {100 * generator.cpu_share:.0f} % of a core, sent late by p50 "
        f"{figure(generator.late_p50_ms)} ms, p99 {figure(generator.late_p99_ms)} ms, at most "
        f"{figure(generator.late_max_ms)} ms"
    )
    notes += _footnotes(report.url, report.server, report.settings, report.machine, report.versions)
    if report.adapters_named:
        notes.append(f"{report.adapters_named:,} different adapters named")
    if report.interrupted:
        notes.append(f"interrupted: what was measured in {report.seconds:.1f} of {report.settings.duration_s:g} s")
    return Group(_counts(report), _latency(report), *(Text(note, style="dim") for note in notes))


def render_rate(report: RateReport) -> RenderableType:
    """One row a step, the answer below."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    quantile = f"p{100 * report.quantile:g}"
    table = Table(title=f"{report.model}: {quantile} within {report.slo_ms:g} ms")
    for name in ("rate (1/s)", "seconds", "sent", "achieved (1/s)", f"{quantile} (ms)"):
        table.add_column(name, justify="right")
    for name in (f"within {report.slo_ms:g} ms (%)", "failed (%)", "sent late, p99 (ms)", "CPU of generator (%)"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for step in report.steps:
        table.add_row(
            figure(step.rate_per_s),
            f"{step.seconds:.1f}",
            f"{step.sent:,}",
            figure(step.achieved_per_s),
            figure(step.quantile_ms),
            f"{100 * step.share:.2f}",
            f"{100 * step.failed_share:.2f}",
            figure(step.late_p99_ms),
            f"{100 * step.cpu_share:.0f}",
            step.verdict,
        )
    notes = _footnotes(report.url, report.server, report.settings, report.machine, report.versions)
    notes.insert(0, "within: of all requests sent; one that failed or was shed counts as late")
    if report.interrupted:
        notes.append("interrupted: the search is not finished")
    return Group(table, Text(_answer(report), style="bold"), *(Text(note, style="dim") for note in notes))


def _answer(report: RateReport) -> str:
    if report.found_per_s is None:
        return "no rate that was tried is within the objective"
    found = f"{figure(report.found_per_s)} requests a second are within the objective"
    if report.limit_per_s is None:
        return found
    return f"{found}, {figure(report.limit_per_s)} are not (limited by the {report.limited_by})"


def _counts(report: LoadReport) -> Table:
    from rich.table import Table

    table = Table(title=f"{report.model}: {report.settings.rate_per_s:g} requests a second for {report.seconds:.4g} s")
    cells = {
        "offered (1/s)": figure(report.offered_per_s),
        "achieved (1/s)": figure(report.achieved_per_s),
        "sent": f"{report.sent:,}",
        "ok": f"{report.ok:,}",
        "shed": f"{report.shed:,}",
    }
    for kind, count in report.errors.items():
        cells[f"HTTP {kind}" if kind.isdigit() else kind] = f"{count:,}"
    if not report.errors:
        cells["errors"] = "0"
    if report.unfinished:
        cells["unfinished"] = f"{report.unfinished:,}"
    if report.objective is not None:
        cells[f"within {report.objective.slo_ms:g} ms (%)"] = f"{100 * report.objective.share:.2f}"
        cells["goodput (1/s)"] = figure(report.objective.goodput_per_s)
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    return table


def _latency(report: LoadReport) -> Table:
    from rich.table import Table

    table = Table(title="Latency")
    table.add_column("")
    names = [*QUANTILES, "max"]
    for name in names:
        table.add_column(name, justify="right")
    found = [report.latency.get(name) for name in QUANTILES]
    table.add_row("ms", *(figure(each.ms if each is not None else None) for each in found), figure(report.max_ms))
    table.add_row("95 % interval", *(_interval(each) for each in found), "")
    return table


def _interval(latency: Latency | None) -> str:
    if latency is None:
        return REFUSED
    return f"{figure(latency.low_ms)} to {figure(latency.high_ms)}"


def _footnotes(
    url: str, server: ServerInfo, settings: LoadSettings, machine: Machine, versions: dict[str, str]
) -> list[str]:
    name = f" ({f'{server.name} {server.version}'.strip()})" if server.name else ""
    adapters = f", adapters {settings.adapters}" if settings.adapters is not None else ""
    installed = ", ".join(f"{package} {version}" for package, version in {**machine.versions, **versions}.items())
    load = "unknown" if machine.load_1min is None else f"{machine.load_1min:.2f}"
    return [
        f"to {url}{name}: {settings.payload}{adapters}, {settings.warmup_s:g} s of warm-up before, Poisson arrivals, "
        f"seed {settings.seed}",
        f"from {machine.cpu}, {machine.cores} cores, load {load} before; Python {machine.python}, {installed}",
    ]
