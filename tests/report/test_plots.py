"""What is drawn is what the report holds, read back from the figure."""

from __future__ import annotations

import sys

import msgspec
import pytest

from deployfa.errors import MissingExtraError
from deployfa.report import plots
from deployfa.report.plots import draw

figures = pytest.importorskip("matplotlib.figure")


def with_results(report, **change):
    results = [msgspec.structs.replace(each, **change) for each in report.bench.results]
    return msgspec.structs.replace(report, bench=msgspec.structs.replace(report.bench, results=results))


def test_forest_has_every_interval_and_the_line_at_one(report):
    canvas = figures.Figure()
    assert plots._ratios(canvas, report)
    (axes,) = canvas.axes
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert lines[0] == [1, 1]
    assert lines[1::2] == [[0.991, 1.014], [1.031, 1.066], [0.979, 0.998], [1.012, 1.043]]
    assert lines[2::2] == [[1.003], [1.047], [0.989], [1.028]]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "1x128  folded", "1x128  side-op", "8x128  folded", "8x128  side-op",
    ]  # fmt: skip
    low, high = axes.get_xlim()
    assert low < 0.979 and high > 1.066


def test_a_ratio_without_interval_is_not_drawn(report):
    canvas = figures.Figure()
    assert not plots._ratios(canvas, with_results(report, ratio_low=None))
    assert "ratios" not in draw(with_results(report, ratio_low=None))


def test_bars_are_percent_from_zero(report):
    canvas = figures.Figure()
    assert plots._accuracy(canvas, report)
    (axes,) = canvas.axes
    heights = [round(bar.get_height(), 1) for bars in axes.containers for bar in bars]
    assert heights == [65.4, 58.0, 58.7, 62.5, 80.1, 79.2, 79.4, 77.6, 83.2, 78.0, 82.3, 78.9]
    assert axes.get_ylim() == (0, 100) and "(%)" in axes.get_ylabel()


def test_whiskers_go_from_fastest_to_p95(report):
    canvas = figures.Figure()
    assert plots._latency(canvas, report)
    assert [axes.get_title() for axes in canvas.axes] == ["1x128", "8x128"]
    (segments,) = canvas.axes[0].collections[0].get_segments()
    assert list(segments[:, 1]) == pytest.approx([0.95 * 9.86, 1.09 * 9.86])
    assert [bar.get_height() for bar in canvas.axes[1].patches] == [67.9, 67.2, 69.8]


def test_no_whisker_without_p95_and_no_panel_without_medians(report):
    canvas = figures.Figure()
    assert plots._latency(canvas, with_results(report, p95_ms=None))
    assert not any(axes.collections for axes in canvas.axes)
    assert "latency" not in draw(with_results(report, p50_ms=None, p95_ms=None))


def test_percentiles_in_the_wrong_order_do_not_stop_the_page(report):
    assert "latency" in draw(with_results(report, p50_ms=1.0, p95_ms=0.5, min_ms=2.0))


def test_parity_dots_and_limit(report):
    canvas = figures.Figure()
    assert plots._parity(canvas, report)
    lines = [list(line.get_xdata()) for line in canvas.axes[0].lines]
    assert lines[1:12:2] == [[1.0], [0.87], [0.93], [1.0], [0.91], [1.12]]
    assert lines[-1] == [2.0, 2.0]


def test_an_infinite_error_is_left_to_the_table(report):
    found = report.parity["folded"]
    stages = [msgspec.structs.replace(stage, noise_ratio=float("inf")) for stage in found.stages]
    parity = {"folded": msgspec.structs.replace(found, stages=stages)}
    assert "parity" not in draw(msgspec.structs.replace(report, parity=parity))


def test_ink_is_the_page_s(report):
    for name, svg in draw(report).items():
        assert "currentColor" in svg and plots._INK not in svg, name
        assert 'role="img"' in svg and "aria-label=" in svg
        # black is matplotlib's default: an element that lost its colour would vanish on a dark page
        assert "#000000" not in svg and "fill: black" not in svg, name


def test_without_matplotlib(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deployfa\[report\]'"):
        draw(report)
