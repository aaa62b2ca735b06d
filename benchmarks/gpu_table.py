"""The tables of ``gpu.py``, made from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["markdown"]


def markdown(report: dict[str, Any]) -> str:
    parts = report["parts"]
    lines = ["# On a GPU", ""]
    if "inference" in parts:
        lines += _part("inference", parts["inference"], _inference)
    if "training" in parts:
        lines += _part("training", parts["training"], _training)
    return "\n".join(lines)


def _part(name: str, part: dict[str, Any], tables: Any) -> list[str]:
    return [f"## {name}", "", _machine(part["machine"]), "", *tables(part), *_not_run(part["not_run"])]


def _inference(part: dict[str, Any]) -> list[str]:
    lines = [
        f"MiniLM, {part['method']} on all 36 linears. GPU: between CUDA events, inputs on the GPU; wall: of the host, "
        "from arrays to arrays, copies included. Ratios are of medians, round by round, in one precision, with 95 % "
        "intervals: GPU time over PyTorch eager's, folded, and over the same system's, folded. Error: against the "
        "float64 reference at that shape, and the most that was allowed.",
        "",
    ]
    head = [
        "system",
        "form",
        "GPU (ms)",
        "wall (ms)",
        "over PyTorch eager",
        "over folded",
        "error (allowed)",
        "samples",
    ]
    results = part["results"]
    for precision in _unique(row["precision"] for row in results):
        for batch, sequence in _unique((row["batch"], row["sequence"]) for row in results):
            rows = [
                [
                    row["system"],
                    row["form"],
                    _number(row["gpu_p50_ms"], ".3f"),
                    _number(row["wall_p50_ms"], ".3f"),
                    _interval(row, "gpu_over_pytorch"),
                    _interval(row, "gpu_over_folded"),
                    f"{row['error']:.1e} ({row['error_limit']:.1e})",
                    str(row["samples"]),
                ]
                for row in results
                if (row["precision"], row["batch"], row["sequence"]) == (precision, batch, sequence)
            ]
            if rows:
                lines += [f"### {precision}, {batch}x{sequence}", "", *_markdown(head, rows), ""]
    return lines


def _training(part: dict[str, Any]) -> list[str]:
    head = [
        "method",
        "precision",
        "trainable",
        "samples/s",
        "over full [95 % interval]",
        "peak memory (MB)",
        "launches",
    ]
    rows = [
        [
            row["method"],
            row["precision"],
            f"{row['trainable']:,}",
            f"{row['samples_per_s']:.0f}",
            _interval(row, "over_full"),
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            str(row["launches"]),
        ]
        for row in part["results"]
    ]
    about = f"MiniLM, {part['rows']:,} sentences, batches of {part['batch_size']}; bf16 is autocast."
    return [about, "", *_markdown(head, rows), ""] if rows else [about, ""]


def _machine(machine: dict[str, Any]) -> str:
    gpu = machine["gpu"]
    said = [
        f"{gpu['name']} (compute capability {gpu['compute_capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB)",
        f"driver {gpu['driver'] or 'unknown'}",
    ]
    for when in ("before", "after"):
        smi = gpu.get(when) or {}
        clocks = [smi.get(name) for name in ("clocks.sm", "clocks.mem", "temperature.gpu", "utilization.gpu")]
        if any(clocks):
            said.append(f"{when}: SM {clocks[0]}, memory {clocks[1]}, {clocks[2]} °C, {clocks[3]} busy")
    said.append(f"{machine['cpu']}, {machine['cores']} cores")
    said.append(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    return "; ".join(said) + "."


def _not_run(rows: list[dict[str, Any]]) -> list[str]:
    """One line a reason: what it kept from running."""
    if not rows:
        return []
    reasons: dict[str, list[str]] = {}
    for row in rows:
        reasons.setdefault(row["reason"], []).append(_whom(row))
    lines = [[f"{'; '.join(whom)}", reason.replace("|", "\\|")] for reason, whom in reasons.items()]
    return ["Not run:", "", *_markdown(["what", "why"], lines), ""]


def _whom(row: dict[str, Any]) -> str:
    if "method" in row:
        return f"{row['method']}, {row['precision']}"
    shape = "" if row["batch"] is None else f", {row['batch']}x{row['sequence']}"
    return f"{row['system']}, {row['form']}, {row['precision']}{shape}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "–"
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows)]


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
