"""What a session runs, counted on small graphs whose fusions are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError
from deployfa.runtimes.fused_operators import fused_operators, session_graph

WIDTH = 16


def save(path: Path, nodes, outputs, weights) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "g",
        [value("x", TensorProto.FLOAT, ["batch", "sequence", WIDTH])],
        [value(name, TensorProto.FLOAT, ["batch", "sequence", None]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def counted(path: Path, unfused: Path | None = None) -> dict[str, int]:
    return fused_operators(path, ir.load(unfused or path))


def test_what_the_runtime_fuses_at_load_is_counted(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["hb"]),
        helper.make_node("Gelu", ["hb"], ["g"]),
        helper.make_node("Add", ["g", "x"], ["s"]),
        helper.make_node("LayerNormalization", ["s", "gamma", "beta"], ["y"], axis=-1),
    ]
    weights = {"w": draw(WIDTH, WIDTH), "b": draw(WIDTH), "gamma": draw(WIDTH), "beta": draw(WIDTH)}
    path = save(tmp_path / "a.onnx", nodes, ["y"], weights)
    assert counted(path) == {"com.microsoft::BiasGelu": 1, "com.microsoft::SkipLayerNormalization": 1}


def packed(path: Path, parts: int, *, bias: bool) -> Path:
    names = [f"y{number}" for number in range(parts)]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"])]
    if bias:
        nodes.append(helper.make_node("Add", ["h", "b"], ["hb"]))
    nodes.append(helper.make_node("Split", ["hb" if bias else "h"], names, axis=-1, num_outputs=parts))
    return save(path, nodes, names, {"w": draw(WIDTH, parts * WIDTH), "b": draw(parts * WIDTH)})


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_told_apart_by_how_many_are_in_one(tmp_path: Path, parts: int, bias: bool) -> None:
    alone = save(tmp_path / "alone.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"])], ["y"], {"w": draw(16, 16)})
    path = packed(tmp_path / "p.onnx", parts, bias=bias)
    assert counted(path, alone) == {f"packed MatMul ({parts} in 1)": 1}


def test_a_model_that_is_packed_by_itself_has_no_fusion(tmp_path: Path) -> None:
    """GPT-2's c_attn: three in one before anything is fused."""
    assert counted(packed(tmp_path / "p.onnx", 3, bias=True)) == {}


def test_a_split_of_anything_else_is_not_packed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Split", ["h"], ["y", "z"], axis=-1, num_outputs=2),
    ]
    other = save(tmp_path / "other.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["y"], {})
    assert counted(save(tmp_path / "s.onnx", nodes, ["y", "z"], {}), other) == {}


def test_more_plain_operators_are_no_fusion(tmp_path: Path) -> None:
    one = save(tmp_path / "one.onnx", [helper.make_node("Relu", ["x"], ["y"])], ["y"], {})
    nodes = [helper.make_node("Sigmoid", ["x"], ["a"]), helper.make_node("Mul", ["a", "w"], ["y"])]
    assert counted(save(tmp_path / "two.onnx", nodes, ["y"], {"w": draw(WIDTH)}), one) == {}


def test_weights_beside_the_graph_are_found_and_nothing_is_left(tmp_path: Path, monkeypatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    inside = save(tmp_path / "inside.onnx", nodes, ["y"], {"w": draw(WIDTH, WIDTH)})
    folder = tmp_path / "beside"
    folder.mkdir()
    ir.save(ir.load(inside), folder / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    assert {node.op_type for node in session_graph(folder / "m.onnx").graph} == {"MatMul", "Relu"}
    assert list(scratch.iterdir()) == []
    assert {file.name for file in folder.iterdir()} == {"m.onnx", "m.data"}


def test_what_does_not_load_is_one_clear_error(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="no graph at"):
        session_graph(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeTargetError, match="does not load"):
        session_graph(tmp_path / "broken.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"deployfa\[cpu\]"):
        session_graph(tmp_path / "broken.onnx")
