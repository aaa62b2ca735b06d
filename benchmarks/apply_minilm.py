"""How long it takes to place an adapter on MiniLM's base graph, and how much memory.

    python benchmarks/apply_minilm.py --out benchmarks/results/apply_minilm.json

Each adapter (VeFA and LoRFA r=8 on all 36 encoder linears, random values) is placed in processes of their own, several
times; a run plans and rewrites, first with the weights still on disk.  Memory is how far the peak of the resident set
rises above what it was once the libraries were loaded and the adapter made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SITES = [
    f"bert.encoder.layer.{layer}.{name}"
    for layer in range(6)
    for name in (
        *(f"attention.self.{part}" for part in ("query", "key", "value")),
        *("attention.output.dense", "intermediate.dense", "output.dense"),
    )
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--worker", choices=("vefa", "lorfa"), help=argparse.SUPPRESS)
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker, options.graph)))
        return
    import msgspec

    from deployfa.bench.machine import describe_machine

    graph = minilm_graph()
    size = sum(file.stat().st_size for file in graph.parent.glob("model.onnx*"))
    # interleaved: a busy minute hits both
    runs: dict[str, list[dict[str, float]]] = {"vefa": [], "lorfa": []}
    for _ in range(options.launches):
        for method, found in runs.items():
            found.append(launch(method, graph))
    report = {
        "graph_bytes": size,
        "launches": options.launches,
        "machine": msgspec.to_builtins(describe_machine()),
        "methods": {method: summary(found, size) for method, found in runs.items()},
    }
    for method, one in report["methods"].items():
        print(
            f"{method}: {one['seconds_median']:.3f} s (slowest {one['seconds_max']:.3f}), "
            f"{one['memory_ratio_max']:.2f} x the graph's {size / 1e6:.0f} MB"
        )
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def launch(method: str, graph: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", method, "--graph", str(graph)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def summary(runs: list[dict[str, float]], size: int) -> dict[str, float]:
    seconds = [run["seconds"] for run in runs]
    return {
        "seconds_median": statistics.median(seconds),
        "seconds_max": max(seconds),
        "memory_bytes_max": max(run["bytes"] for run in runs),
        "memory_ratio_max": max(run["bytes"] for run in runs) / size,
    }


def work(method: str, graph: Path) -> dict[str, float]:
    from deployfa.adapter import Adapter
    from deployfa.edits import Edit, LowRank
    from deployfa.graph import apply_adapter, make_plan
    from deployfa.graph.storage import load_graph

    rng = np.random.default_rng(0)

    def edit(k: int) -> Edit:
        if method == "vefa":
            return Edit(lam=(0.1 * rng.standard_normal(k)).astype(np.float32))
        a, b = rng.standard_normal((8, k)), 0.01 * rng.standard_normal((k, 8))
        return Edit(input_low_rank=LowRank(a.astype(np.float32), b.astype(np.float32), 1.0))

    adapter = Adapter(
        method,
        {site: edit(1536 if site.endswith("output.dense") and "attention" not in site else 384) for site in SITES},
    )
    before = resident("VmRSS")
    # 5: forget the peak so far (that of the imports)
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    model = load_graph(graph)
    adapted = apply_adapter(model, adapter, make_plan(model, adapter, require_fold=True))
    seconds = time.perf_counter() - start
    assert len(adapted.graph) == len(model.graph)
    return {"seconds": seconds, "bytes": resident("VmHWM") - before}


def resident(which: str) -> float:
    """Bytes of resident memory, now (``VmRSS``) or at its peak (``VmHWM``); Linux counts kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def minilm_graph() -> Path:
    """MiniLM's base graph from the cache, exported now if it is not there."""
    from deployfa.adapter import Adapter, BaseReference
    from deployfa.assets import fetch
    from deployfa.base_graphs import base_graph
    from deployfa.edits import Edit

    folder = fetch("minilm")
    adapter = Adapter(
        "vefa",
        {SITES[0]: Edit(lam=np.zeros(384, np.float32))},
        {"classifier": {"weight": np.zeros((2, 384), np.float32), "bias": np.zeros(2, np.float32)}},
        base=BaseReference(name=str(folder)),
        labels=("negative", "positive"),
    )
    return base_graph(adapter, model=str(folder)).folder / "model.onnx"


if __name__ == "__main__":
    main()
