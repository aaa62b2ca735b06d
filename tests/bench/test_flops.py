"""Operations counted from real runs against what pencil and paper say."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from deployfa.bench import Shape
from deployfa.bench.feeds import make_feeds
from deployfa.bench.flops import count_graph_flops, count_module_flops, operator_flops
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.torch import TorchRunner

MS = "com.microsoft"


def save(path, node, x, weights, *, ranks=(), extra=()):
    """One node, its first input fed, the others weights."""
    names = [f"w{i}" for i in range(len(weights))]
    node.input.extend(["x", *names])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node, *extra],
        "g",
        [value("x", helper.np_dtype_to_tensor_dtype(x.dtype), [f"d{i}" for i in range(x.ndim)])],
        [value(name, TensorProto.UNDEFINED, None) for name in node.output],
        [numpy_helper.from_array(weight, name) for name, weight in zip(names, weights, strict=True)],
    )
    for output in graph.output:
        output.ClearField("type")
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def f32(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def i8(*shape):
    return np.random.default_rng(0).integers(0, 100, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("op", "attributes", "x", "weights", "expected"),
    [
        ("MatMul", {}, f32(2, 5, 6), [f32(6, 7)], 2 * 10 * 6 * 7),
        ("MatMul", {}, f32(2, 3, 5, 6), [f32(2, 3, 6, 4)], 2 * 6 * 5 * 6 * 4),
        ("MatMul", {}, f32(6), [f32(6, 7)], 2 * 6 * 7),
        ("Gemm", {}, f32(5, 6), [f32(6, 7), f32(7)], 2 * 5 * 6 * 7),
        ("Gemm", {"transA": 1, "transB": 1}, f32(6, 5), [f32(7, 6)], 2 * 5 * 6 * 7),
        ("Conv", {"pads": [1, 1, 1, 1]}, f32(2, 4, 8, 8), [f32(6, 4, 3, 3)], 2 * (2 * 6 * 8 * 8) * (4 * 9)),
        ("Conv", {"group": 4, "strides": [2, 2]}, f32(1, 4, 9, 9), [f32(4, 1, 3, 3)], 2 * (4 * 4 * 4) * 9),
        ("ConvTranspose", {}, f32(1, 4, 5), [f32(4, 3, 2)], 2 * 4 * 5 * 3 * 2),
        ("MatMulInteger", {}, i8(5, 6), [i8(6, 7)], 2 * 5 * 6 * 7),
        (f"{MS}::FusedMatMul", {"transA": 1}, f32(2, 6, 5), [f32(2, 6, 7)], 2 * 2 * 5 * 6 * 7),
        (f"{MS}::FusedMatMul", {"transB": 1}, f32(2, 5, 6), [f32(7, 6)], 2 * 2 * 5 * 6 * 7),
        # attention: (queries, keys) and (weights, values), each 2 b s t d
        (f"{MS}::MultiHeadAttention", {"num_heads": 2}, f32(2, 5, 8), [f32(2, 9, 8)] * 2, 4 * 2 * 5 * 9 * 8),
        (
            f"{MS}::Attention",
            {"num_heads": 2},
            f32(2, 5, 6),
            [f32(6, 24), f32(24)],
            2 * 10 * 6 * 24 + 4 * 2 * 5 * 5 * 8,
        ),
        ("Attention", {"q_num_heads": 2, "kv_num_heads": 2}, f32(2, 5, 8), [f32(2, 9, 8)] * 2, 4 * 2 * 5 * 9 * 8),
        ("Attention", {}, f32(2, 2, 5, 4), [f32(2, 2, 9, 4)] * 2, 4 * 2 * 5 * 9 * 8),
        ("Softmax", {}, f32(2, 5), [], 0),
    ],
)
def test_one_operator(tmp_path, op, attributes, x, weights, expected):
    domain, _, name = op.rpartition("::")
    node = helper.make_node(name, [], ["y"], domain=domain, **attributes)
    assert count_graph_flops(save(tmp_path / "g.onnx", node, x, weights), {"x": x}).flops == expected


def test_packed_heads_which_the_cpu_cannot_run():
    assert operator_flops("MultiHeadAttention", [[2, 5, 2, 3, 4]], [[2, 5, 8]]) == 4 * 2 * 5 * 5 * 8


def test_a_chain_is_exact_and_a_dropped_node_shows(make_graph):
    shape = Shape(3, 5)
    counts = {}
    for layers in (1, 2, 3):
        path = make_graph(layers=layers, width=64)
        counts[layers] = count_graph_flops(path, make_feeds(OnnxRuntimeRunner(path, threads=1).inputs, shape)).flops
    product = 2 * 15 * 64 * 64
    assert counts == {1: product, 2: 2 * product, 3: 3 * product}


def test_only_the_branch_that_ran_is_counted(tmp_path):
    value, make = helper.make_tensor_value_info, helper.make_node

    def branch(repeats):
        nodes = [make("MatMul", ["x" if i == 0 else f"b{i}", "w"], [f"b{i + 1}"]) for i in range(repeats)]
        return helper.make_graph(nodes, f"b{repeats}", [], [value(f"b{repeats}", TensorProto.FLOAT, [4, 4])])

    graph = helper.make_graph(
        [make("If", ["c"], ["y"], then_branch=branch(1), else_branch=branch(3))],
        "g",
        [value("x", TensorProto.FLOAT, [4, 4]), value("c", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(f32(4, 4), "w")],
    )
    path = tmp_path / "if.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    for taken, repeats in ((True, 1), (False, 3)):
        assert count_graph_flops(path, {"x": f32(4, 4), "c": np.array(taken)}).flops == repeats * 2 * 64


def test_none_and_a_reason_rather_than_a_wrong_number(tmp_path):
    node = helper.make_node("Einsum", [], ["y"], equation="ij,jk->ik")
    found = count_graph_flops(save(tmp_path / "g.onnx", node, f32(2, 3), [f32(3, 4)]), {"x": f32(2, 3)})
    assert found.flops is None and found.reason == "no rule for a Einsum of [[2, 3], [3, 4]]"
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    found = count_graph_flops(tmp_path / "broken.onnx", {})
    assert found.flops is None and "could not be profiled" in found.reason
    assert operator_flops("SomebodysFusedThing", [[2, 3]], [[2, 3]]) is None
    assert operator_flops("GroupQueryAttention", [[1, 2, 8], [1, 2, 8]], [[1, 2, 8]]) is None
    # a cache: how long it is does not show
    assert operator_flops("MultiHeadAttention", [[1, 2, 8]] * 3, [[1, 2, 8], [1, 2, 9, 4]]) is None
    # the sides of this product do not fit together
    assert operator_flops("FusedMatMul", [[2, 5, 6], [9, 7]], [[2, 5, 7]]) is None


def test_a_module_counts_like_the_graph_of_the_same_layers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            heads = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return self.out(mixed.transpose(1, 2).flatten(2))

    torch.set_num_threads(1)
    runner = TorchRunner(Block(), ["x"], ["y"])
    expected = 2 * 10 * 8 * 8 + 4 * 2 * 5 * 5 * 8 + 2 * 10 * 8 * 3
    assert count_module_flops(lambda: runner.run({"x": f32(2, 5, 8)})).flops == expected
