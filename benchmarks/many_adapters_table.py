"""The table and the plot of ``many_adapters.py``, made from its JSON alone."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["TARGETS", "draw", "markdown"]

#: What was set out to be reached, and where.
TARGETS = {
    "idle": "the slot bundle without an adapter, over the base: at most 1.02",
    "mixed": "16 adapters in a batch, over one folded adapter: VeFA at most 1.03, LoRFA at most 1.15",
    "rivals": "16 adapters in a batch, over each of the others: at least 4 times the throughput",
    "resident": "10,000 adapters: at most 1.1x their raw bytes, latency over 16 adapters at most 1.02",
    "swap": "from an adapter in memory to the first answer, less one inference: at most 1 ms",
}


def markdown(report: dict[str, Any]) -> str:
    parts = report["parts"]
    lines = ["# Many adapters on one model", ""]
    for part, target in TARGETS.items():
        if part not in parts:
            continue
        machine = parts[part]["machine"]
        lines += [f"## {part}", "", f"Wanted: {target}.", "", *_table(part, parts[part]["results"]), ""]
        lines += [f"{machine['cpu']}, {machine['cores']} cores, no GPU; load before: {machine['load_1min']:.2f}.", ""]
    return "\n".join(lines)


def _table(part: str, results: list[dict[str, Any]]) -> list[str]:
    if part == "swap":
        head = ["way", "one inference (ms)", "swap (ms) [95 % interval]", "samples"]
        rows = [[r["way"], f"{r['inference_ms']:.2f}", _interval(r, "extra_ms"), str(r["samples"])] for r in results]
        return _markdown(head, rows)
    lines: list[str] = []
    if part == "resident":
        memory, results = results[0], results[1:]
        lines = [
            f"Raw bytes {memory['raw_bytes'] / 1e6:.0f} MB, resident {memory['memory_bytes'] / 1e6:.0f} MB "
            f"({memory['memory_ratio']:.3f}x), loaded in {memory['load_seconds']:.2f} s.",
            "",
        ]
    if part in {"idle", "mixed"}:
        head = ["shape", "spinning", "contender", "p50 (ms)", "ratio [95 % interval]", "peak memory (MB)", "samples"]
        rows = [
            [
                f"{r['batch']}x{r['sequence']}",
                r["spinning"],
                r["contender"],
                f"{r['p50_ms']:.2f}",
                _interval(r, "ratio"),
                f"{r['peak_memory_bytes'] / 1e6:.0f}",
                str(r["samples"]),
            ]
            for r in results
        ]
    else:
        head = ["shape", "way", "p50 (ms)", "rows/s", "time over the first [95 % interval]", "samples"]
        rows = [
            [
                f"{r['batch']}x{r['sequence']}",
                r["way"],
                f"{r['p50_ms']:.2f}",
                f"{r['rows_per_s']:.0f}",
                _interval(r, "ratio"),
                str(r["samples"]),
            ]
            for r in results
        ]
    return [*lines, *_markdown(head, rows)]


def _interval(result: dict[str, Any], name: str) -> str:
    if result[f"{name}_low"] is None:
        return "1"
    return f"{result[name]:.3f} [{result[f'{name}_low']:.3f}, {result[f'{name}_high']:.3f}]"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows)]


def draw(report: dict[str, Any]) -> str:
    """Every ratio with its interval, part by part, as SVG."""
    from matplotlib import style
    from matplotlib.figure import Figure

    groups = {part: _ratios(part, report["parts"][part]["results"]) for part in TARGETS if part in report["parts"]}
    groups = {part: ratios for part, ratios in groups.items() if ratios}
    if not groups:
        return "<svg xmlns='http://www.w3.org/2000/svg'/>"
    sizes = [len(ratios) for ratios in groups.values()]
    looks = {"svg.fonttype": "none", "svg.hashsalt": "deployfa", "figure.constrained_layout.use": True}
    with style.context(["default", looks]):
        figure = Figure(figsize=(8.5, 0.8 * len(sizes) + 0.3 * sum(sizes)))
        axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": [s + 1 for s in sizes]})
        for (part, ratios), (axis,) in zip(groups.items(), axes, strict=True):
            for height, (label, middle, low, high) in enumerate(reversed(ratios)):
                axis.errorbar(
                    middle, height, xerr=[[middle - low], [high - middle]], fmt="o", capsize=3, color="#3d7fe0"
                )
                axis.text(-0.01, height, label, ha="right", va="center", transform=axis.get_yaxis_transform(), size=8)
            axis.axvline(1, color="#8a94a6", linewidth=0.8)
            axis.set_yticks([])
            axis.set_ylim(-0.6, len(ratios) - 0.4)
            axis.set_title(f"{part}: time, ratio to the first", size=10, loc="left")
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _ratios(part: str, results: list[dict[str, Any]]) -> list[tuple[str, float, float, float]]:
    if part == "swap":
        return []
    found = []
    for r in results:
        if r.get("ratio_low") is None:
            continue
        spins = ", spinning" if r.get("spinning") == "on" else ""
        label = f"{r.get('contender') or r.get('way')}, {r['batch']}x{r['sequence']}{spins}"
        found.append((label, r["ratio"], r["ratio_low"], r["ratio_high"]))
    return found
