"""``deployfa doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deployfa.cli.console import print_json, show, spinner
from deployfa.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from deployfa.doctor import Answer, DoctorReport

__all__ = ["doctor"]


def doctor(
    target: Annotated[
        str | None, typer.Option("--target", help="Ask for one target: exit 0 if it runs here, 1 if it does not.")
    ] = None,
    json: Json = False,
) -> None:
    """What this machine has: runtimes, providers, GPUs; which targets can be built here, which run here, and why not.

    Every library is loaded and every target of ONNX Runtime runs a graph, each in a process of its own.  Exit 0; with
    --target 0 if it runs here and 1 if it does not; 2 for a target that there is not.

    Example: deployfa doctor --target tensorrt-rtx
    """
    from deployfa.doctor import examine

    with spinner("looking around") as status:
        report = examine([target] if target is not None else [], status=status)
    if json:
        print_json(report)
    else:
        show(*_render(report))
    if target is not None and not report.targets[0].run.yes:
        raise typer.Exit(1)


def _render(report: DoctorReport) -> list[Table | str]:
    return [
        f"{report.system}, {report.cores} cores, Python {report.python}",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        *_devices(report),
        _runtimes(report),
        _targets(report),
        *_reasons(report),
    ]


def _devices(report: DoctorReport) -> list[str]:
    if report.no_devices is not None:
        return [report.no_devices]
    driver = f"NVIDIA driver {report.driver or 'of unknown version'}"
    return [
        *(
            f"GPU: {each.name}, compute capability {each.compute_capability}, {each.memory_bytes / 1e9:.1f} GB"
            for each in report.devices
        ),
        driver + (f", for CUDA up to {report.cuda}" if report.cuda else ""),
    ]


def _runtimes(report: DoctorReport) -> Table:
    from rich.table import Table

    table = Table(title="Runtimes")
    table.add_column("runtime", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("import (ms)", justify="right")
    table.add_column("what it says")
    for each in report.runtimes:
        says = each.reason or ", ".join(each.providers)
        if each.compute_capabilities:
            says = f"builds for compute capability {', '.join(each.compute_capabilities)} without a GPU"
        spent = "–" if each.import_ms is None else f"{each.import_ms:.0f}"
        table.add_row(each.name, each.version or "–", spent, says)
    return table


def _targets(report: DoctorReport) -> Table:
    from rich.table import Table

    table = Table(title="Targets")
    for column in ("target", "builds here", "runs here"):
        table.add_column(column, no_wrap=True)
    for each in report.targets:
        table.add_row(each.target, *("yes" if answer.yes else "no" for answer in (each.build, each.run)))
    return table


def _reasons(report: DoctorReport) -> list[str]:
    """One line for each "no"; the same reason once for both."""
    lines = []
    for each in report.targets:
        told: dict[Answer, list[str]] = {}
        for what, answer in (("built", each.build), ("run", each.run)):
            if not answer.yes:
                told.setdefault(answer, []).append(what)
        for answer, whats in told.items():
            command = f"\n  {answer.install}" if answer.install else ""
            lines.append(f"{each.target} cannot be {' or '.join(whats)} here: {answer.reason}{command}")
    return lines
