"""Apply an adapter to a graph of more than 2 GB, and see how much memory it takes.

    python benchmarks/large_graph.py --folder /somewhere/with/6/GB

Makes a graph of four 12,000 x 12,000 float32 layers (2.3 GB in one external file), applies a VeFA and a LoRFA to it
with the command, each in a process of its own, and prints the peak of its resident memory beside the promise: 1.3 times
the largest changed weight and 300 MB.  Rows of the result are compared with the formula in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Edit, LowRank
from deployfa.graph.storage import load_graph

SIZE, LAYERS, RANK = 12_000, 4, 8
ROWS = [0, 1, SIZE // 3, SIZE - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Where to write; 6 GB.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = make_graph(options.folder / "base")
    report = {
        "graph_bytes": sum(file.stat().st_size for file in base.parent.iterdir()),
        "sites": LAYERS,
        "largest_weight_bytes": 4 * SIZE * SIZE,
        "runs": [apply(base, method, options.folder) for method in ("vefa", "lorfa")],
    }
    shutil.rmtree(base.parent)
    if options.json:
        print(json.dumps(report))
        return
    limit = 1.3 * report["largest_weight_bytes"] + 300e6
    print(f"graph {report['graph_bytes'] / 1e9:.2f} GB, largest weight {report['largest_weight_bytes'] / 1e6:.0f} MB")
    for run in report["runs"]:
        print(
            f"{run['method']}: peak {run['peak_bytes'] / 1e6:.0f} MB (promised {limit / 1e6:.0f}), "
            f"{run['seconds']:.1f} s, largest difference {run['largest_difference']:.1e} "
            f"(float32 rounding allows {run['allowed_difference']:.1e})"
        )


def make_graph(folder: Path) -> Path:
    """``x → MatMul → … → MatMul``, weights written block by block."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    block = rng.standard_normal((SIZE // 100, SIZE)).astype(np.float32)
    data = folder / "model.onnx.data"
    with data.open("wb") as file:
        for number in range(LAYERS * 100):
            (block * np.float32(1 + number / 1000)).tofile(file)
    x = ir.Value(name="x", shape=ir.Shape(["batch", SIZE]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights, value = [], [], x
    for layer in range(LAYERS):
        name = f"layers.{layer}.weight.T"
        tensor = ir.ExternalTensor(
            "model.onnx.data",
            layer * 4 * SIZE * SIZE,
            4 * SIZE * SIZE,
            ir.DataType.FLOAT,
            shape=ir.Shape([SIZE, SIZE]),
            name=name,
            base_dir=folder,
        )
        weight = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        node = ir.node("MatMul", [value, weight], name=f"node_{layer}")
        value = node.outputs[0]
        value.name, value.shape, value.type = f"y{layer}", x.shape, x.type
        nodes.append(node)
        weights.append(weight)
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="large")
    path = folder / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def apply(base: Path, method: str, folder: Path) -> dict[str, object]:
    """Run the command; how much memory it took, and how right it is."""
    adapter, out = folder / f"{method}.safetensors", folder / f"{method}.out"
    rng = np.random.default_rng(1)
    edits = {f"layers.{layer}": edit(method, rng) for layer in range(LAYERS)}
    Adapter(method, edits).save(adapter, force=True)
    command = [sys.executable, "-m", "deployfa.cli", "apply", base, "--adapter", adapter, "--out", out, "--json"]
    start = time.monotonic()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE)
    assert child.stdout is not None
    answer = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - start
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"error: {' '.join(map(str, command))} failed")
    placements: dict[str, int] = {}
    for planned in json.loads(answer)["plan"]["edits"]:
        placements[planned["placement"]] = placements.get(planned["placement"], 0) + 1
    largest, allowed = compare(base, out / "model.onnx", edits)
    shutil.rmtree(out)
    return {
        "method": method,
        "placements": placements,
        # Linux counts kilobytes
        "peak_bytes": usage.ru_maxrss * 1024,
        "seconds": seconds,
        "largest_difference": largest,
        "allowed_difference": allowed,
    }


def edit(method: str, rng: np.random.Generator) -> Edit:
    if method == "vefa":
        return Edit(lam=(0.3 * rng.standard_normal(SIZE)).astype(np.float32))
    a, b = (0.1 * rng.standard_normal(shape) for shape in ((RANK, SIZE), (SIZE, RANK)))
    return Edit(input_low_rank=LowRank(a.astype(np.float32), b.astype(np.float32), 0.5))


def compare(base: Path, out: Path, edits: dict[str, Edit]) -> tuple[float, float]:
    """The largest difference of ``ROWS`` from ``S' = (1+λ) S + s Aᵀ (Bᵀ S)``, and half a unit of the largest number."""
    before, after = load_graph(base), load_graph(out)
    largest = allowed = 0.0
    for layer in range(LAYERS):
        name = f"layers.{layer}.weight.T"
        stored = before.graph.initializers[name].const_value
        written = after.graph.initializers[name].const_value
        assert stored is not None and written is not None
        s, found, one = stored.numpy(), written.numpy(), edits[f"layers.{layer}"]
        expected = s[ROWS].astype(np.float64)
        if one.lam is not None:
            expected = expected * (1 + one.lam.astype(np.float64)[ROWS, None])
        if one.input_low_rank is not None:
            low = one.input_low_rank
            b = low.b.astype(np.float64)
            steps = range(0, SIZE, 1000)
            mixed = sum((b[at : at + 1000].T @ s[at : at + 1000].astype(np.float64) for at in steps), np.zeros(()))
            expected = expected + low.s * low.a[:, ROWS].astype(np.float64).T @ mixed
        largest = max(largest, float(np.abs(found[ROWS] - expected).max()))
        # half a unit in the last place of the largest number
        allowed = max(allowed, float(np.spacing(np.abs(expected).max().astype(np.float32))) / 2 * (1 + 1e-6))
    return largest, allowed


if __name__ == "__main__":
    main()
