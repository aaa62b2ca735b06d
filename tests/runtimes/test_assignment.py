"""Which nodes fell back: real sessions on the CPU, held against providers that took nothing.

AzureExecutionProvider is in the onnxruntime for CPUs and takes no node of an ordinary graph: asked for, it is what a
GPU's provider would be that supports nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.assignment import RECORD, check_assignment, fallbacks
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

CPU, AZURE, CUDA = "CPUExecutionProvider", "AzureExecutionProvider", "CUDAExecutionProvider"
F32, I64 = TensorProto.FLOAT, TensorProto.INT64
value, node = helper.make_tensor_value_info, helper.make_node


def graph(nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: dict[str, Any]) -> bytes:
    made = helper.make_graph(
        list(nodes), "g", list(inputs), list(outputs), [numpy_helper.from_array(a, n) for n, a in weights.items()]
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def session(content: bytes | Path, *, optimize: bool = True) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(RECORD, "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = content if isinstance(content, bytes) else str(content)
    return ort.InferenceSession(source, options, providers=[CPU])


def fallen(content: bytes, *, optimize: bool = True) -> list[str]:
    return [each.name for each in fallbacks(session(content, optimize=optimize), CUDA, content, optimize=optimize)]


WEIGHT = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def flattened() -> bytes:
    """``softmax(reshape(x W, [batch, -1]))``: two nodes compute, three make the shape."""
    return graph(
        [
            node("MatMul", ["x", "w"], ["h"], name="product"),
            node("Shape", ["h"], ["shape"], name="shape"),
            node("Gather", ["shape", "first"], ["batch"], name="batch"),
            node("Concat", ["batch", "rest"], ["target"], name="target", axis=0),
            node("Reshape", ["h", "target"], ["flat"], name="flat"),
            node("Softmax", ["flat"], ["y"], name="softmax"),
        ],
        [value("x", F32, ["b", "s", 4])],
        [value("y", F32, ["b", "n"])],
        {"w": WEIGHT, "first": np.array([0]), "rest": np.array([-1])},
    )


@pytest.mark.parametrize("optimize", [True, False])
def test_every_node_that_computes_is_named_and_shape_arithmetic_is_not(flattened: bytes, optimize: bool) -> None:
    assert fallen(flattened, optimize=optimize) == ["product", "flat", "softmax"]


def test_nothing_fell_back_from_the_provider_that_took_everything(flattened: bytes) -> None:
    assert fallbacks(session(flattened), CPU, flattened) == []
    check_assignment(session(flattened), CPU, flattened)


def test_a_session_that_keeps_no_record_is_an_error(flattened: bytes) -> None:
    with pytest.raises(Exception, match="record_ep_graph_assignment_info"):
        fallbacks(ort.InferenceSession(flattened, providers=[CPU]), CUDA, flattened)


def scales(*, from_values: bool) -> bytes:
    """A ``Resize`` by scales in floats, made of the input's shape, or of its values."""
    if from_values:
        first = node("ReduceMax", ["x", "others"], ["sizes"], name="sizes", keepdims=0)
        second = node("Floor", ["sizes"], ["floats"], name="floats")
    else:
        first = node("Shape", ["x"], ["sizes"], name="sizes")
        second = node("Cast", ["sizes"], ["floats"], name="floats", to=F32)
    nodes = [
        first,
        second,
        node("Div", ["floats", "floats"], ["ones"], name="ones"),
        node("Mul", ["ones", "by"], ["scales"], name="scales"),
        node("Resize", ["x", "", "scales"], ["y"], name="resize", mode="nearest"),
    ]
    weights = {"by": np.array([1, 1, 2, 2], np.float32), "others": np.array([0, 2, 3])}
    return graph(
        nodes,
        [value("x", F32, [2, 4, "h", "w"])],
        [value("y", F32, [2, 4, "h2", "w2"])],
        weights,
    )


def test_floats_that_are_made_of_shapes_alone_are_shape_arithmetic() -> None:
    assert fallen(scales(from_values=False)) == ["resize"]


def test_the_same_floats_made_of_values_are_not() -> None:
    assert fallen(scales(from_values=True)) == ["sizes", "floats", "ones", "scales", "resize"]


def test_floats_of_two_axes_count_though_only_shapes_are_behind_them() -> None:
    nodes = [
        node("Shape", ["x"], ["shape"], name="shape"),
        node("Cast", ["shape"], ["sizes"], name="sizes", to=F32),
        node("Expand", ["sizes", "square"], ["grid"], name="grid"),
        node("Add", ["x", "grid"], ["y"], name="sum"),
    ]
    content = graph(nodes, [value("x", F32, ["b", 2])], [value("y", F32, ["b", 2])], {"square": np.array([2, 2])})
    assert fallen(content) == ["grid", "sum"]


def test_a_large_constant_is_no_shape_arithmetic() -> None:
    def scaled(size: int) -> bytes:
        nodes = [
            node("Shape", ["x"], ["shape"], name="shape", start=0, end=1),
            node("Cast", ["shape"], ["sizes"], name="sizes", to=F32),
            node("Mul", ["sizes", "weights"], ["y"], name="product"),
        ]
        weights = {"weights": np.ones(size, np.float32)}
        return graph(nodes, [value("x", F32, ["b", 3])], [value("y", F32, [size])], weights)

    assert fallen(scaled(100)) == []
    assert fallen(scaled(101)) == ["product"]


def test_positions_and_masks_are_indices_and_what_reads_weights_with_them_is_not() -> None:
    content = graph(
        [
            node("Equal", ["ids", "padding"], ["mask"], name="mask"),
            node("Add", ["ids", "one"], ["next"], name="next"),
            node("Gather", ["table", "next"], ["rows"], name="embedding"),
            node("Where", ["mask", "ids", "next"], ["chosen"], name="chosen"),
        ],
        [value("ids", I64, ["b", "s"])],
        [value("rows", F32, ["b", "s", 4]), value("chosen", I64, ["b", "s"])],
        {"table": WEIGHT, "padding": np.array([0]), "one": np.array([1])},
    )
    assert fallen(content) == ["embedding"]


def test_quantised_numbers_are_numbers() -> None:
    """Its tensors are integers throughout: 8 bits in, 32 out."""
    content = graph(
        [node("MatMulInteger", ["x", "w"], ["y"], name="product"), node("Add", ["y", "y"], ["z"], name="sum")],
        [value("x", TensorProto.UINT8, ["b", 4])],
        [value("z", TensorProto.INT32, ["b", 4])],
        {"w": np.ones((4, 4), np.uint8)},
    )
    assert fallen(content) == ["product"]


def branches() -> bytes:
    """An ``If`` with nodes of the same name in both branches, one of which computes; and nodes without a name."""

    def branch(name: str, nodes: list[Any]) -> Any:
        return helper.make_graph(nodes, name, [], [value(f"{name}_y", F32, ["b", 4])])

    return graph(
        [
            node("MatMul", ["x", "w"], ["h"]),
            node(
                "If",
                ["condition"],
                ["y"],
                name="choice",
                then_branch=branch("one", [node("Relu", ["h"], ["one_y"], name="inside")]),
                else_branch=branch("two", [node("Neg", ["h"], ["two_y"], name="inside")]),
            ),
        ],
        [value("x", F32, ["b", 4]), value("condition", TensorProto.BOOL, [1])],
        [value("y", F32, ["b", 4])],
        {"w": WEIGHT},
    )


def test_nodes_in_branches_and_nodes_without_a_name_are_found() -> None:
    content = branches()
    found = {str(each) for each in fallbacks(session(content), CUDA, content)}
    assert found == {"an unnamed MatMul", "'choice' (If)", "'inside' (Relu)", "'inside' (Neg)"}


def test_a_node_that_is_not_in_the_graph_counts(flattened: bytes) -> None:
    """In doubt it fell back: the record of one session, the graph of another."""
    other = onnx.load_from_string(flattened)
    for each in other.graph.node:
        each.name = f"other_{each.name}"
    found = fallbacks(session(other.SerializeToString()), CUDA, flattened)
    assert len(found) == 6 and all(each.name.startswith("other_") for each in found)


def test_the_error_names_node_operator_module_and_the_way_out(bundles: dict[str, Path]) -> None:
    path = bundles["folded"] / "model.onnx"
    with pytest.raises(RuntimeTargetError) as caught:
        check_assignment(session(path), CUDA, path)
    message = str(caught.value)
    assert message.startswith("asked for CUDAExecutionProvider, but ")
    assert "nodes fell back to CPUExecutionProvider: 'node_embedding' (Gather in bert.embeddings.word_embe" in message
    assert message.endswith(
        "export the bundle again with --optimize none, which keeps to standard operators, or pick the target "
        "onnxruntime-cpu"
    )
    assert "\n" not in message


def test_of_a_whole_model_every_layer_is_named_and_no_shape(bundles: dict[str, Path]) -> None:
    path = bundles["folded"] / "model.onnx"
    found = fallbacks(session(path), CUDA, path)
    operators = [each.operator for each in found]
    assert {"Shape", "Unsqueeze", "Range", "And", "Not"}.isdisjoint(operators)
    stored = onnx.load(path, load_external_data=False)
    weighted = [each.name for each in stored.graph.node if each.op_type in {"MatMul", "Gemm"}]
    assert set(weighted) <= {each.name for each in found}
    layers = {each.module for each in found if each.operator == "MatMul"}
    assert "bert.encoder.layer.5.output.dense" in layers


def test_a_runner_on_a_provider_that_takes_nothing_is_refused(flattened: bytes, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeTargetError, match=r"asked for Azure.* 3 of 6 nodes fell back to CPU.*'product' \(MatMul\)"
    ):
        OnnxRuntimeRunner(flattened, provider=AZURE)
    path = tmp_path / "flattened.onnx"
    path.write_bytes(flattened)
    for optimize in (True, False):
        with pytest.raises(RuntimeTargetError, match="fell back"):
            OnnxRuntimeRunner(path, provider=AZURE, optimize=optimize)


def test_a_runner_whose_nodes_are_all_shape_arithmetic_is_not() -> None:
    content = graph(
        [node("Shape", ["x"], ["s"], name="shape"), node("Add", ["s", "one"], ["y"], name="sum")],
        [value("x", F32, ["b", 4])],
        [value("y", I64, [2])],
        {"one": np.array([1])},
    )
    runner = OnnxRuntimeRunner(content, provider=AZURE)
    assert runner.run({"x": np.zeros((3, 4), np.float32)})["y"].tolist() == [4, 5]
