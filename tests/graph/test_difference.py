"""Graphs of one structure: exactly the tensors whose bits differ; of two: a refusal that names the place."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.graph.difference import StructureDiffers, changed_tensors, with_tensors

W, B, G = (np.random.default_rng(0).standard_normal(shape) for shape in ((4, 4), (4,), (4,)))


@pytest.fixture
def make(builder):
    """``make(**changes)`` → ``Relu(((x w) + b) g) · g``, with what ``changes`` say otherwise."""

    def graph(*, w=W, b=B, g=G, g2=None, dtype=np.float32, prefix="", act="Relu", axis=-1, swapped=False, extra=False):
        net = builder(dtype)
        x = net.input("x", "n", 4)
        weights = {name: net.const(prefix + name, array) for name, array in (("w", w), ("b", b), ("g", g))}
        second = net.const(f"{prefix}g2", g2) if g2 is not None else weights["g"]
        h = net.op("Add", net.op("MatMul", x, weights["w"]), weights["b"], out=f"{prefix}h")
        if extra:
            h = net.op("Mul", h, weights["g"], out=f"{prefix}extra")
        h = net.op(act, net.op("Mul", h, weights["g"]))
        s = net.op("Softmax", net.op("Mul", h, second), axis=axis)
        return net.model(net.op("Sub", *((s, h) if swapped else (h, s)), out="y"))

    return graph


def test_equal_graphs_differ_in_nothing(make) -> None:
    assert changed_tensors(make(), make()) == {}


@pytest.mark.parametrize("names", [("w",), ("b",), ("w", "g"), ("w", "b", "g")])
def test_exactly_the_changed_tensors_come_out_under_the_first_graphs_names(make, names) -> None:
    new = {name: {"w": W, "b": B, "g": G}[name] + 1 for name in names}
    found = changed_tensors(make(), make(prefix="renumbered_", **new))
    assert found.keys() == set(names)
    for name, array in new.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32))


def test_bits_decide_not_equality(make) -> None:
    zero, minus = np.zeros(4), -np.zeros(4)
    assert list(changed_tensors(make(b=zero), make(b=minus))) == ["b"]
    nan = np.array([np.nan, 1, 2, 3])
    assert changed_tensors(make(b=nan), make(b=nan.copy())) == {}


def test_a_file_and_the_graph_in_memory_are_the_same(make, tmp_path) -> None:
    from deployfa.graph.storage import load_graph, save_graph

    stored = load_graph(save_graph(make(), tmp_path))
    assert changed_tensors(stored, make()) == {}
    assert list(changed_tensors(stored, make(w=W + 1))) == ["w"]


@pytest.mark.parametrize(
    ("change", "what", "name"),
    [
        ({"extra": True}, "Mul", "extra"),
        ({"act": "Sigmoid"}, "Relu became Sigmoid", "v"),
        ({"axis": 0}, "attribute 'axis' of Softmax changed", "v"),
        ({"swapped": True}, "comes from elsewhere", "y"),
        ({"b": np.zeros((1, 4))}, r"a tensor is float \[1, 4\] and no longer float \[4\]", "b"),
        ({"dtype": np.float64}, "a tensor is double", "w"),
        ({"g2": G + 1}, "what was one tensor for several layers became two", "g2"),
    ],
)
def test_another_structure_is_refused_and_its_place_named(make, change, what, name) -> None:
    with pytest.raises(StructureDiffers, match=what) as caught:
        changed_tensors(make(), make(**change))
    assert any(name in each for each in caught.value.names)


def test_a_copy_with_the_same_values_is_no_other_structure(make) -> None:
    """The other graph keeps two equal tensors apart, or has merged them: the numbers are the same either way."""
    assert changed_tensors(make(), make(g2=G)) == {}
    assert changed_tensors(make(g2=G), make()) == {}
    assert set(changed_tensors(make(g2=G), make(g=G + 1))) == {"g", "g2"}


def test_renamed_inputs_and_outputs_are_another_structure(make) -> None:
    for part in ("inputs", "outputs"):
        renamed = make()
        getattr(renamed.graph, part)[0].name = "other"
        with pytest.raises(StructureDiffers, match=f"the {part}"):
            changed_tensors(make(), renamed)


def test_a_constant_that_became_computed_is_another_structure(make, builder) -> None:
    def graph(computed: bool) -> ir.Model:
        net = builder()
        x, w = net.input("x", 4, 4), net.const("w", W)
        a = net.op("Relu", w)
        return net.model(net.op("MatMul", x, a if computed else w), net.op("Relu", a))

    with pytest.raises(StructureDiffers, match="a constant became computed, or the reverse"):
        changed_tensors(graph(False), graph(True))


def test_an_operand_more_is_another_structure(builder) -> None:
    def graph(bias: bool) -> ir.Model:
        net = builder()
        operands = [net.input("x", "n", 4), net.const("site.weight", W)]
        return net.model(net.op("Gemm", *operands, *([net.const("site.bias", B)] if bias else [])))

    with pytest.raises(StructureDiffers, match="added or left out") as caught:
        changed_tensors(graph(False), graph(True))
    assert "site.bias" in caught.value.names


def branches(inside: float, outside: float) -> ir.Model:
    """``If(c) then x * inside else x * outside``, the one constant in the branch, the other in the graph around it."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def branch(name: str, factor: str, own: list[onnx.TensorProto]) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node("Mul", ["x", factor], [name])], name, [], [value(name, 2)], own)

    inner, outer = (
        numpy_helper.from_array(np.full(2, number, np.float32), name)
        for name, number in (("inside", inside), ("outside", outside))
    )
    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("a", "inside", [inner]), else_branch=branch("b", "outside", [])
    )
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition, value("x", 2)], [value("y", 2)], [outer])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def test_subgraphs_are_looked_into(make) -> None:
    assert changed_tensors(branches(1, 2), branches(1, 2)) == {}
    assert list(changed_tensors(branches(1, 2), branches(1, 3))) == ["outside"]
    # a session can replace the main graph's initializers only
    with pytest.raises(StructureDiffers, match="inside a subgraph"):
        changed_tensors(branches(1, 2), branches(5, 2))


def test_with_tensors_changes_a_copy(make) -> None:
    model, wanted = make(), make(w=W + 1, b=B - 1)
    changed = with_tensors(model, changed_tensors(model, wanted))
    assert changed_tensors(changed, wanted) == {}
    assert changed_tensors(model, make()) == {}
    assert changed.graph.initializers["g"].const_value is model.graph.initializers["g"].const_value
