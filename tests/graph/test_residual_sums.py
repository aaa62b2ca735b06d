"""Norms parted from their addition: the same numbers, and no fused operator left for the runtime to make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.graph.residual_sums import residual_sums
from deployfa.graph.storage import save_graph
from deployfa.runtimes.fused_operators import fused_operators
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

K = 8


def initializer(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def skip_norm(*, bias: bool, read_sum: bool, read_mean: bool = False) -> ir.Model:
    """logits = SkipLayerNormalization(x², skip²), and its sum where asked."""
    random = np.random.default_rng(0)
    inputs = [
        ir.Value(name=name, shape=ir.Shape(["batch", "sequence", K]), type=ir.TensorType(ir.DataType.FLOAT))
        for name in ("x", "skip")
    ]
    weights = [
        initializer(name, random.standard_normal(K).astype(np.float32))
        for name in (("gamma", "beta", "bias") if bias else ("gamma", "beta"))
    ]
    squares = [ir.node("Mul", [value, value], name=f"square_{value.name}") for value in inputs]
    for node in squares:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    fused = ir.Node(
        "com.microsoft",
        "SkipLayerNormalization",
        [node.outputs[0] for node in squares] + weights,
        attributes=[ir.AttrFloat32("epsilon", 1e-3)],
        num_outputs=4,
        name="norm",
    )
    names = ["answer", "mean", "deviation", "total"]
    for name, output in zip(names, fused.outputs, strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    outputs = [fused.outputs[0]] + ([fused.outputs[3]] if read_sum else [])
    outputs += [fused.outputs[1]] if read_mean else []
    for output in outputs:
        output.shape = ir.Shape(["batch", "sequence", K])
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=[*squares, fused],
        initializers=weights,
        opset_imports={"": 20, "com.microsoft": 1},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def answers(model: ir.Model, folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    random = np.random.default_rng(1)
    feeds = {name: random.standard_normal((2, 3, K)).astype(np.float32) for name in ("x", "skip")}
    return OnnxRuntimeRunner(save_graph(model, folder), threads=1).run(feeds)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("read_sum", [False, True])
def test_the_fused_operator_becomes_a_sum_and_a_norm(tmp_path: Path, bias: bool, read_sum: bool) -> None:
    model = skip_norm(bias=bias, read_sum=read_sum)
    before = answers(model, tmp_path / "before")
    assert residual_sums(model) == 1
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["Mul", "Mul", *(["Add"] if bias else []), "Sum", "LayerNormalization"]
    after = answers(model, tmp_path / "after")
    assert list(after) == list(before)
    for name, wanted in before.items():
        # a sum of three and a norm over eight, in another order
        np.testing.assert_allclose(
            after[name], wanted, rtol=0, atol=8 * np.finfo(np.float32).eps * np.abs(wanted).max()
        )
    if bias:  # a bias that is left out, or an epsilon that is another, is seen
        model.graph.initializers["bias"].const_value = ir.tensor(np.zeros(K, np.float32), name="bias")
        assert not np.allclose(answers(model, tmp_path / "wrong")["answer"], before["answer"], atol=1e-3)


def test_epsilon_is_kept(tmp_path: Path) -> None:
    model = skip_norm(bias=False, read_sum=False)
    residual_sums(model)
    assert model.graph[-1].attributes["epsilon"].as_float() == np.float32(1e-3)


def test_a_mean_that_is_read_keeps_the_fused_operator() -> None:
    model = skip_norm(bias=False, read_sum=False, read_mean=True)
    assert residual_sums(model) == 0
    assert [node.op_type for node in model.graph] == ["Mul", "Mul", "SkipLayerNormalization"]


@pytest.mark.parametrize("parted", [False, True])
def test_the_runtime_makes_no_skip_norm_of_it(tmp_path: Path, parted: bool) -> None:
    """Written as Add it does, which is what this file is for."""
    model = skip_norm(bias=False, read_sum=False)
    residual_sums(model)
    if not parted:
        node = next(node for node in model.graph if node.op_type == "Sum")
        node.op_type = "Add"
    unfused = model.clone()
    counts = fused_operators(save_graph(model, tmp_path), unfused)
    assert ("com.microsoft::SkipLayerNormalization" in counts) is not parted
    assert residual_sums(model) == (0 if parted else 1)


def test_a_bias_before_a_norm_is_no_residual(builder) -> None:
    g = builder()
    x = g.op("Mul", g.input("x", 2, K), g.const("w", np.ones(K, np.float32)))
    biased = g.op("Add", x, g.const("b", np.ones(K, np.float32)))
    model = g.model(g.op("LayerNormalization", biased, g.const("gamma", np.ones(K, np.float32)), axis=-1, out="y"))
    assert residual_sums(model) == 0
