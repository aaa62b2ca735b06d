"""The fusions that ``--optimize auto`` chooses from, on one model, at the shapes of a server and of a device.

    python benchmarks/fusions.py --out benchmarks/results

MiniLM with a classifier of two labels, no adapter, float32, all cores; ``deployfa.bench``: a process for each fusion,
interleaved, spinning threads off and on.  The ratio is to the graph without any fusion of ours.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from many_adapters import adapter

from deployfa.base_graphs import base_graph
from deployfa.bench import Contender, Shape, bench
from deployfa.graph.optimize import FUSIONS, fuse
from deployfa.graph.storage import save_graph

SHAPES = (Shape(1, 16), Shape(1, 128), Shape(8, 32), Shape(8, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="The folder of fusions.json and fusions.md.")
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--samples", type=int, default=130)
    parser.add_argument("--seconds", type=float, default=40.0, help="The most for one shape.")
    options = parser.parse_args()
    graph = base_graph(adapter("vefa", 0)).load()
    with tempfile.TemporaryDirectory(prefix="deployfa-fusions-") as scratch:
        contenders = []
        for name in FUSIONS:
            folder = Path(scratch) / name
            folder.mkdir()
            contenders.append(Contender(label=name, graph=save_graph(fuse(graph, name), folder)))
        report = bench(
            contenders,
            SHAPES,
            spinning="both",
            launches=options.launches,
            min_samples=options.samples,
            max_seconds_per_shape=options.seconds,
            flops=False,
            bare_matmul=False,
        )
    kept = ("contender", "batch", "sequence", "spinning", "samples", "p50_ms", "ratio", "ratio_low", "ratio_high")
    content = {
        "machine": msgspec.to_builtins(report.machine),
        "results": [{name: getattr(result, name) for name in kept} for result in report.results],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "fusions.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (options.out / "fusions.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """p50 of each fusion, and the ratio to none of them with its 95 % interval."""
    machine = content["machine"]
    lines = ["# Fusions of MiniLM", "", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}.", ""]
    lines += ["| shape | spinning | fusion | p50 (ms) | ratio to none |", "|---|---|---|---|---|"]
    for row in content["results"]:
        ratio = f"{row['ratio']:.3f}"
        if row["ratio_low"] is not None:  # what the others are compared with has no interval
            ratio += f" [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        shape = f"{row['batch']}x{row['sequence']}"
        lines.append(f"| {shape} | {row['spinning']} | {row['contender']} | {row['p50_ms']:.2f} | {ratio} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
