"""What ``placements.py`` measures of an architecture, and the table that it makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from deployfa.parity.measures import LIMIT

__all__ = ["Measured", "Parity", "Row", "markdown"]


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter placed in one way.  The errors are ``‖found - truth‖ / ‖truth‖`` over the model's own float32 noise;
    ``float64`` is the graph in exact arithmetic, where only the stored weights are rounded, ``None`` if
    ``onnx.reference`` cannot evaluate it.
    """

    placements: dict[str, int]
    reasons: dict[str, str]
    """Site → why it became a side op."""
    onnxruntime: float | None
    float64: float | None
    failure: str | None
    """Why there is no error to show."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter on one architecture.  ``noise``: float32 against float64 in PyTorch, relative; ``effect``: what the
    adapter does to the output, and ``corrupted`` the error when two numbers of one edit are swapped, both over it."""

    noise: float
    effect: float
    corrupted: float
    modes: dict[str, Parity]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture.  ``missing``: layers that ran in PyTorch and are no site of the graph."""

    architecture: str
    model: str
    parameters: int
    expected: int
    found: int
    missing: list[str]
    adapters: dict[str, Measured]
    not_in_float64: str | None


def markdown(rows: Sequence[Row]) -> str:
    """One table for each adapter, and under it what did not fold and why."""
    lines = [
        "# Placements",
        "",
        "Made by `python benchmarks/placements.py --out benchmarks/results`. Every layer that runs is adapted. Errors",
        "are against PyTorch in float64 with the adapter unfolded, over the float32 noise of that same model (limit",
        f"{LIMIT:g}): ONNX Runtime in float32 without its fusions, and in brackets the graph in float64. *Corrupted*",
        "is the error after two numbers of one edit were swapped. `auto` prefers the smallest patch; *folded* is of",
        "`auto`.",
    ]
    for kind in rows[0].adapters:
        lines += ["", f"## {kind}", "", *_table(rows, kind), *_reasons(rows, kind)]
    failures = [
        f"- {row.architecture}, {kind}, {mode}: {parity.failure}"
        for row in rows
        for kind, measured in row.adapters.items()
        for mode, parity in measured.modes.items()
        if parity.failure
    ]
    if failures:
        lines += ["", "## Failed", "", *failures]
    missing = [f"- {row.architecture}: {', '.join(row.missing)}" for row in rows if row.missing]
    if missing:
        lines += ["", "## Not found", "", *missing]
    lacking = [row for row in rows if row.not_in_float64]
    if lacking:
        lines += ["", "## Not evaluated in float64", ""]
        lines += [f"- {row.architecture}: `{row.not_in_float64}`" for row in lacking]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row], kind: str) -> Iterator[str]:
    modes = list(rows[0].adapters[kind].modes)
    yield (
        "| architecture | sites found / expected | "
        + " | ".join(f"{mode} | error" for mode in modes)
        + " | corrupted | folded |"
    )
    yield "|---|---|" + "---|---|" * len(modes) + "---|---|"
    for row in rows:
        measured = row.adapters[kind]
        cells = [row.architecture, f"{row.found} / {row.expected}"]
        for parity in measured.modes.values():
            cells.append(", ".join(f"{count} {placement}" for placement, count in parity.placements.items()))
            cells.append(f"{_figure(parity.onnxruntime)} ({_figure(parity.float64)})")
        left = len(measured.modes["auto"].reasons)
        folded = "100 %" if not left else f"{100 * (row.found - left) / row.found:.0f} %"
        yield "| " + " | ".join([*cells, f"{measured.corrupted:,.0f}", folded]) + " |"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _reasons(rows: Sequence[Row], kind: str) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        found = row.adapters[kind].modes["auto"].reasons
        for reason in dict.fromkeys(found.values()):
            sites = [site for site, why in found.items() if why == reason]
            more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
            reasons.setdefault(reason, []).append(f"{row.architecture} (`{sites[0]}`{more})")
    if reasons:
        yield ""
        yield "Not folded:"
        yield ""
        yield from (f"- {reason}: {', '.join(where)}" for reason, where in reasons.items())
