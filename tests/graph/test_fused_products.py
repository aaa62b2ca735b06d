"""Products that ONNX Runtime refuses are parted, and give what numpy gives; others stay fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.errors import RuntimeTargetError
from deployfa.graph.fused_products import part_products
from deployfa.graph.storage import save_graph
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def product(left: tuple[int, ...], right: tuple[int, ...], **attributes: float) -> tuple[ir.Model, np.ndarray]:
    """FusedMatMul of an input ``x`` and a stored weight."""
    weight = np.random.default_rng(0).standard_normal(right).astype(np.float32)
    x = ir.Value(name="x", type=FLOAT, shape=ir.Shape(left))
    stored = ir.Value(name="w", type=FLOAT, shape=ir.Shape(right), const_value=ir.tensor(weight, name="w"))
    node = ir.node("FusedMatMul", [x, stored], attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 18, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10), weight


def run(model: ir.Model, x: np.ndarray, folder: Path) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    return OnnxRuntimeRunner(save_graph(model, folder), threads=1).run({"x": x})["y"]


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_head_of_a_decoder(alpha: float, tmp_path: Path) -> None:
    """(kept, batch, width), moved to (batch, kept, width), by the embedding, (vocabulary, width)."""
    model, weight = product((3, 2, 4), (5, 4), transB=1, transBatchA=1, alpha=alpha)
    x = np.random.default_rng(1).standard_normal((3, 2, 4)).astype(np.float32)
    with pytest.raises(RuntimeTargetError, match="same rank"):
        run(model, x, tmp_path / "before")
    assert part_products(model) == 1
    assert "FusedMatMul" not in {node.op_type for node in model.graph}
    assert [value.name for value in model.graph.outputs] == ["y"]
    wanted = alpha * (x.transpose(1, 0, 2) @ weight.T)
    np.testing.assert_allclose(run(model, x, tmp_path / "after"), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("also", [False, True])
def test_the_permutation_is_onnx_runtimes(side: str, also: bool, tmp_path: Path) -> None:
    """Where it does run, at four dimensions alike, it gives what the parted one gives."""
    from deployfa.graph import fused_products

    flags = {f"transBatch{side}": 1, **({f"trans{side}": 1} if also else {})}
    # the operand as it is stored: its first dimension goes behind the batch of two
    moved = (4, 2, 3, 4)
    model, _ = product(moved if side == "A" else (2, 3, 4, 4), moved if side == "B" else (2, 3, 4, 4), **flags)
    x = np.random.default_rng(1).standard_normal(model.graph.inputs[0].shape.numpy()).astype(np.float32)
    wanted = run(model, x, tmp_path / "fused")
    (node,) = model.graph
    fused_products._part(model.graph, model.graph, node)
    np.testing.assert_allclose(run(model, x, tmp_path / "parted"), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("left", "right", "flags"),
    [((2, 3, 4), (2, 5, 4), {"transB": 1, "alpha": 2.0}), ((2, 3, 4), (5, 4), {"transB": 1}), ((2, 3, 4), (4, 5), {})],
)
def test_what_runs_stays(
    left: tuple[int, ...], right: tuple[int, ...], flags: dict[str, float], tmp_path: Path
) -> None:
    model, weight = product(left, right, **flags)
    assert part_products(model) == 0
    x = np.random.default_rng(1).standard_normal(left).astype(np.float32)
    turned = np.swapaxes(weight, -1, -2) if "transB" in flags else weight
    np.testing.assert_allclose(run(model, x, tmp_path), flags.get("alpha", 1) * (x @ turned), rtol=1e-5, atol=1e-6)
