"""Graphs from strangers: data outside the folder, damaged and truncated files."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from deployfa.errors import InputError
from deployfa.graph.evaluate import evaluate
from deployfa.graph.storage import load_graph, save_graph


@pytest.fixture
def model(builder):
    g = builder()
    w = np.arange(600, dtype=np.float32).reshape(20, 30)
    return g.model(g.op("MatMul", g.input("x", 2, 20), g.const("fc.weight.T", w), site="fc", out="y"))


def test_round_trip(tmp_path, model, as_bytes):
    before = as_bytes(model)
    path = save_graph(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 1000 and as_bytes(model) == before
    back, x = load_graph(path), np.ones((2, 20), np.float32)
    assert np.array_equal(evaluate(back, [{"x": x}])[0]["y"], evaluate(model, [{"x": x}])[0]["y"])
    assert all("pkg.torch.onnx.name_scopes" in node.metadata_props for node in back.graph)


@pytest.mark.parametrize("share_equal", [False, True])
def test_a_small_weight_from_an_external_file_that_is_still_looked_at(tmp_path, builder, share_equal):
    """As other exporters write it, and as this project did before small weights went inside the graph."""
    g = builder()
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    ir.save(
        g.model(g.op("MatMul", g.input("x", 2, 2), g.const("w", w), out="y")),
        theirs / "model.onnx",
        external_data="model.onnx.data",
        size_threshold_bytes=0,
    )
    graph = load_graph(theirs / "model.onnx")
    looked_at = graph.graph.initializers["w"].const_value.numpy()
    ours = tmp_path / "ours"
    ours.mkdir()
    save_graph(graph, ours, share_equal=share_equal)
    assert isinstance(graph.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert np.array_equal(looked_at, w)
    (theirs / "model.onnx.data").unlink()
    assert np.array_equal(load_graph(ours / "model.onnx").graph.initializers["w"].const_value.numpy(), w)


def external(location, offset=0, length=16, dims=(2, 2), dtype=TensorProto.FLOAT):
    tensor = TensorProto(name="w", dims=dims, data_type=dtype, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    return tensor


def as_initializer(tensor):
    return helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", *ends(), [tensor])


def as_attribute(tensor):
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("MatMul", ["x", "w"], ["y"])]
    return helper.make_graph(nodes, "g", *ends())


def in_subgraph(tensor):
    """An If in an If, with the weight in the inner branch."""
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2, 2])
    cond = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [1]))
    inner = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["b"])], "inner", [], [out], [tensor])
    nested = helper.make_node("If", ["c"], ["b"], then_branch=inner, else_branch=inner)
    branch = helper.make_graph([nested], "branch", [], [out])
    return helper.make_graph(
        [cond, helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], "g", *ends()
    )


def ends():
    value = helper.make_tensor_value_info
    return [value("x", TensorProto.FLOAT, [2, 2])], [value("y", TensorProto.FLOAT, [2, 2])]


PLACES = [as_initializer, as_attribute, in_subgraph]


def write(folder, graph):
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("place", PLACES)
def test_data_inside_the_folder_is_read(tmp_path, place):
    path = write(tmp_path / "bundle", place(external("weights/data")))
    (path.parent / "weights").mkdir()
    (path.parent / "weights" / "data").write_bytes(bytes(16))
    load_graph(path)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret", "weights/../../secret", "ABSOLUTE", "link", "linked/secret"])
def test_data_outside_the_folder_is_refused(tmp_path, place, location):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(16))
    path = write(tmp_path / "bundle", place(external(location.replace("ABSOLUTE", str(secret)))))
    (path.parent / "link").symlink_to(secret)
    (path.parent / "linked").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"lies outside its folder; refused|is not an ONNX graph"):
        load_graph(path)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "lie",
    [
        {"offset": 8},
        {"offset": 17},
        {"offset": -4},
        {"offset": -4, "length": 20},
        {"length": 20},
        {"length": 8},
        {"length": 0},
        {"length": -1},
        {"dims": (4, 4)},
        {"dims": (4, 4), "length": None},
        {"dims": (2**30, 2**30), "length": None},
        {"offset": 4, "length": None},
        {"location": "missing"},
        {"location": "."},
        {"location": ""},
        {"offset": "x"},
    ],
    ids=str,
)
def test_external_data_that_lies(tmp_path, place, lie):
    path = write(tmp_path / "bundle", place(external(**{"location": "data", **lie})))
    (path.parent / "data").write_bytes(bytes(16))
    with pytest.raises(InputError):
        load_graph(path)


def test_truncated_data(tmp_path, model):
    path = save_graph(model, tmp_path)
    data = tmp_path / "model.onnx.data"
    whole = data.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        data.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"reaches past the end of 'model\.onnx\.data'; copy it again"):
            load_graph(path)
    data.unlink()
    with pytest.raises(InputError, match="reaches past the end"):
        load_graph(path)


def test_truncated_graph(tmp_path, model):
    path = tmp_path / "model.onnx"
    whole = ir.to_proto(model).SerializeToString()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="; "):
            load_graph(path)


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"\x08\x0a", b"PK\x03\x04" + bytes(99)])
def test_what_is_no_graph(tmp_path, content):
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not an ONNX graph"):
        load_graph(path)
    with pytest.raises(InputError, match="no graph at"):
        load_graph(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="no graph at"):
        load_graph(tmp_path)


@pytest.mark.parametrize("place", PLACES)
def test_inline_data_of_another_length_than_its_shape(tmp_path, place):
    tensor = TensorProto(name="w", dims=(2, 2), data_type=TensorProto.FLOAT, raw_data=bytes(12))
    with pytest.raises(InputError, match="another length than its shape"):
        load_graph(write(tmp_path, place(tensor)))
    good = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    load_graph(write(tmp_path, place(good)))


def test_a_split_into_hundreds_loads(tmp_path):
    """The sizes of the Split of λ of 210 sites: ONNX Runtime reads them when it loads the graph."""
    from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

    sizes = np.full(210, 2, np.int64)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([420]))
    whole = ir.TensorType(ir.DataType.INT64)
    stored = ir.Value(name="sizes", const_value=ir.tensor(sizes, name="sizes"), type=whole)
    parts = ir.node("Split", [x, stored], {"axis": 0}, num_outputs=210)
    for number, part in enumerate(parts.outputs):
        part.name, part.type = f"part{number}", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], parts.outputs[-1:], nodes=[parts], initializers=[stored], opset_imports={"": 18})
    for share_equal in (False, True):
        folder = tmp_path / str(share_equal)
        folder.mkdir()
        path = save_graph(ir.Model(graph, ir_version=10), folder, share_equal=share_equal)
        found = OnnxRuntimeRunner(path, threads=1).run({"x": np.arange(420, dtype=np.float32)})
        assert found["part209"].tolist() == [418.0, 419.0]
