"""Plots as inline SVG: text stays text, ink takes the page's colour, so they read in light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from deployfa.bench import Result
from deployfa.errors import MissingExtraError
from deployfa.report.demo_report import DemoReport
from deployfa.report.figures import DASH, domains, figure, percent, plain, ratio, shape
from deployfa.report.markup import Html

__all__ = ["draw"]

#: Drawn in this colour, written as ``currentColor``; nothing else on a plot has it.
_INK = "#010203"
_LONGEST = 36
_COLOURS = ("#8a94a6", "#3d7fe0", "#e07b39", "#2aa876", "#a06bd6", "#c7a531")
_LOOK: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.alpha": 0.15,
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    # the same report gives the same page
    "svg.hashsalt": "deployfa",
    # text is text: searchable, and in the reader's font
    "svg.fonttype": "none",
    "text.color": _INK,
    # a label with a $ in it is a label, not a formula
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def draw(report: DemoReport) -> dict[str, Html]:
    """``accuracy``, ``parity``, ``ratios`` and ``latency``, those that the report has figures for.

    Raises ``MissingExtraError`` without matplotlib.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "report", "drawing the plots") from error
    drawn = {}
    with style.context(["default", _LOOK]):
        for name, (fill, label) in _PLOTS.items():
            canvas = Figure()
            if fill(canvas, report):
                drawn[name] = _svg(canvas, name, label)
    return drawn


def _accuracy(canvas: Any, report: DemoReport) -> bool:
    """Grouped bars: a group a domain, a bar a method."""
    names = domains(report)
    if not names:
        return False
    canvas.set_size_inches(9, 3.8)
    axes = canvas.subplots()
    width = 0.8 / len(report.methods)
    for index, method in enumerate(report.methods):
        places = [(i, method.scores[name].balanced_accuracy) for i, name in enumerate(names) if name in method.scores]
        left = [i + (index - (len(report.methods) - 1) / 2) * width for i, _ in places]
        bars = axes.bar(
            left, [100 * score for _, score in places], 0.92 * width, color=_colour(index), label=_short(method.method)
        )
        axes.bar_label(bars, [percent(score) for _, score in places], padding=2, fontsize=8.5)
    axes.set_xticks(range(len(names)), [_short(name) for name in names])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 100)
    axes.set_ylabel("balanced accuracy (%)")
    axes.set_title("Balanced accuracy by domain and method")
    axes.grid(axis="y")
    canvas.legend(loc="outside upper right", ncols=len(report.methods))
    return True


def _parity(canvas: Any, report: DemoReport) -> bool:
    """A dot a stage: its error in units of the model's own noise, with the limit."""
    rows = [
        (f"{_short(bundle)}: {_short(stage.name)}", stage.noise_ratio, index)
        for index, (bundle, found) in enumerate(report.parity.items(), 1)
        for stage in found.stages
        if stage.noise_ratio is not None and math.isfinite(stage.noise_ratio)
    ]
    if not rows:
        return False
    canvas.set_size_inches(9, 1.3 + 0.34 * len(rows))
    axes = canvas.subplots()
    for y, (_, value, index) in enumerate(rows):
        axes.plot([0, value], [y, y], color=_colour(index), linewidth=2, alpha=0.5)
        axes.plot(value, y, "o", color=_colour(index), markersize=8)
        axes.annotate(figure(value), (value, y), (8, 0), textcoords="offset points", va="center", fontsize=9)
    limits = sorted({found.limit for found in report.parity.values()})
    for limit in limits:
        axes.axvline(limit, color=_INK, linestyle="--", linewidth=1)
        axes.annotate(
            f"limit {limit:g}×", (limit, 1), (4, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", va="top", fontsize=9,
        )  # fmt: skip
    axes.set_xlim(0, 1.18 * max([value for _, value, _ in rows] + limits))
    _rows(axes, [name for name, _, _ in rows])
    axes.set_xlabel("error / the model's own float32 noise (×)")
    axes.set_title("Error of every stage, in units of noise")
    return True


def _ratios(canvas: Any, report: DemoReport) -> bool:
    """A forest plot: ratio and 95 % interval, a row a contender and shape, with the line at 1."""
    results = [each for each in report.bench.results if each.verdict != "reference" and ratio(each) != DASH]
    if not results:
        return False
    results.sort(key=lambda each: (each.batch, each.sequence, each.spinning))
    canvas.set_size_inches(9, 1.3 + 0.42 * len(results))
    axes = canvas.subplots()
    order = [each.label for each in report.bench.contenders]
    axes.axvline(1, color=_INK, linewidth=1.2)
    for y, each in enumerate(results):
        colour = _colour(order.index(each.contender) if each.contender in order else 0)
        axes.plot([each.ratio_low, each.ratio_high], [y, y], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot(each.ratio, y, "s", color=colour, markersize=8)
        axes.annotate(
            ratio(each), (1, y), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=9,
        )  # fmt: skip
    ends = [value for each in results for value in (each.ratio_low or 1.0, each.ratio_high or 1.0)]
    reach = max(0.02, 1.15 * max(abs(end - 1) for end in ends))
    axes.set_xlim(1 - reach, 1 + reach)
    _rows(axes, [_contender(each, report) for each in results])
    reference = _short(order[0]) if order else "the reference"
    axes.set_xlabel(f"median latency, as a multiple of {reference} (×)")
    for x, align, word in ((0, "left", "← faster"), (1, "right", "slower →")):
        axes.annotate(word, (x, 1), xycoords="axes fraction", ha=align, va="bottom", fontsize=9)
    axes.set_title("Latency ratio with its 95 % interval")
    return True


def _latency(canvas: Any, report: DemoReport) -> bool:
    """A panel a shape: bars are medians, whiskers go from the fastest run to p95."""
    panels: dict[str, list[Result]] = {}
    for each in report.bench.results:
        suffix = f", spinning {each.spinning}" if len(report.bench.settings.spinning) > 1 else ""
        panels.setdefault(shape(each) + suffix, []).append(each)
    if not any(each.p50_ms is not None for results in panels.values() for each in results):
        return False
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    canvas.set_size_inches(9, 3.4 * lines)
    order = [each.label for each in report.bench.contenders]
    grid = canvas.subplots(lines, columns, squeeze=False).ravel()
    for axes, (name, results) in zip(grid, panels.items(), strict=False):
        for x, each in enumerate(results):
            if each.p50_ms is None:
                continue
            colour = _colour(order.index(each.contender) if each.contender in order else 0)
            axes.bar(x, each.p50_ms, 0.62, color=colour)
            if each.p95_ms is not None:
                # a report from elsewhere may hold them in the wrong order, and a negative length stops matplotlib
                reach = [[max(0.0, each.p50_ms - each.min_ms)], [max(0.0, each.p95_ms - each.p50_ms)]]
                axes.errorbar(x, each.p50_ms, reach, color=_INK, linewidth=1.2, capsize=5)
        axes.set_xticks(
            range(len(results)), [f"{_short(each.contender)}\n{figure(each.p50_ms)} ms" for each in results]
        )
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
        axes.set_ylabel("latency (ms)")
        axes.set_title(name)
        axes.grid(axis="y")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    return True


_PLOTS: dict[str, tuple[Callable[[Any, DemoReport], bool], str]] = {
    "accuracy": (_accuracy, "Grouped bar chart of balanced accuracy in percent, by domain and method"),
    "parity": (_parity, "Dot plot of every stage's error divided by the model's own float32 noise, with the limit"),
    "ratios": (_ratios, "Forest plot of latency ratios to the reference with their 95 percent intervals"),
    "latency": (_latency, "Bar charts of median latency in milliseconds, one panel per shape"),
}


def _rows(axes: Any, names: list[str]) -> None:
    """Named rows, first one on top, with nothing on the left but the names."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _contender(result: Result, report: DemoReport) -> str:
    suffix = f", spinning {result.spinning}" if len(report.bench.settings.spinning) > 1 else ""
    return f"{shape(result)}  {_short(result.contender)}{suffix}"


def _short(text: str) -> str:
    """A label that leaves room for the plot; the tables have it whole."""
    whole = plain(text)
    return whole if len(whole) <= _LONGEST else whole[: _LONGEST - 1] + "…"


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _svg(canvas: Any, name: str, label: str) -> Html:
    """The figure as an element for the page: its ids are its own, its ink is the page's, its size is its frame's."""
    sink = io.StringIO()
    canvas.savefig(sink, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(sink.getvalue())
    for element in list(root):
        if element.tag.endswith("metadata"):
            root.remove(element)
    for element in root.iter():
        # inside HTML the parser knows SVG's names without their namespace
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _own(key, value, name) for key, value in element.attrib.items()}
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _own(key: str, value: str, name: str) -> str:
    """One attribute's value, ids and references to them prefixed with the plot's name."""
    key = key.rpartition("}")[2]
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    return re.sub(r"url\(#", f"url(#{name}-", value).replace(_INK, "currentColor")
