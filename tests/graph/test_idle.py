"""One graph of two branches: what it is made of, what it answers, and what is seen when it is made wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit, LowRank
from deployfa.errors import InputError, PlanError
from deployfa.graph.idle import default_active, idle_branch, with_idle_branch, with_row
from deployfa.graph.optimize import fuse
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_slots
from deployfa.graph.storage import load_graph, save_graph
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.tables import base_row, row_of

BASE = BaseReference(fingerprint="sha256:base")
FUSIONS = ("none", "ort", "ort-sum", "onnxscript")


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def adapter(seed, labels=3):
    """λ, δ and a LoRFA before a layer, an output scale behind one, and a head."""
    edits = {
        "up": Edit(lam=numbers(seed, 20), delta=numbers(seed + 1, 20)),
        "down": Edit(
            input_low_rank=LowRank(numbers(seed + 2, 2, 30), numbers(seed + 3, 30, 2), 0.5),
            output_scale=numbers(seed + 4, 20),
        ),
    }
    modules = {"head": {"weight": numbers(seed + 5, labels, 20), "bias": numbers(seed + 6, labels)}}
    return Adapter("vefa", edits, modules=modules, base=BASE)


@pytest.fixture
def base(builder):
    """``head(down(relu(up(x))))``, its weights large enough to lie outside the graph file."""
    b = builder()
    x = b.input("x", "batch", 20)
    h = b.op("Add", b.op("MatMul", x, b.const("up.w", numbers(1, 20, 30)), site="up"), b.const("up.b", numbers(2, 30)))
    h = b.op("Relu", h)
    h = b.op("MatMul", h, b.const("down.w", numbers(3, 30, 20)), site="down")
    y = b.op("MatMul", h, b.const("head.w", numbers(4, 20, 3)), site="head")
    y = b.op("Add", y, b.const("head.b", numbers(5, 3)), site="head", out="logits")
    return b.model(y)


class Made:
    """The base, its slots for ``adapter(10)`` fused, and both in one."""

    def __init__(self, base, fusion="none", **room):
        self.unfused = base
        self.layout = make_layout(base, {"a": adapter(10)}, **room)
        self.zero = base_row(self.layout, base_heads(base, self.layout))
        self.base, self.slots = fuse(base, fusion), fuse(add_slots(base, self.layout), fusion)
        self.both = with_idle_branch(self.base, self.slots)
        self.whole = with_row(self.both, self.zero)

    def row(self, seed, labels=3):
        weights = base_weights(self.unfused, self.layout)
        return row_of(adapter(seed, labels), self.layout, self.zero, weights=weights)


def run(model, feeds):
    # weights that lie in a file are read into a copy
    model = ir.external_data.load_to_model(model.clone())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return OnnxRuntimeRunner(ir.to_proto(model).SerializeToString(), threads=1).run(feeds)["logits"]


@pytest.fixture
def feeds():
    return {"x": numbers(7, 5, 20)}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_branch_answers_as_the_graph_that_it_was(base, feeds, fusion):
    made = Made(base, fusion)
    idle = run(made.base, feeds)
    assert np.array_equal(run(made.whole, feeds), idle)
    assert np.array_equal(run(idle_branch(made.whole), feeds), idle)
    for seed in (10, 30):
        row = made.row(seed)
        adapted = run(made.whole, {**feeds, **row, **default_active(True)})
        assert np.array_equal(adapted, run(with_row(made.slots, row), feeds))
        assert not np.allclose(adapted, idle)


def test_a_row_without_the_switch_changes_nothing(base, feeds):
    """What a check must see when the switch is forgotten: the base's answers."""
    made = Made(base)
    assert np.array_equal(run(made.whole, {**feeds, **made.row(10)}), run(made.base, feeds))


def test_the_defaults_are_the_base_whichever_branch_runs(base, feeds):
    made = Made(base)
    active = run(made.whole, {**feeds, **default_active(True)})
    # 1 + 0, + 0 and times 1 are exact; the layers are the same operators on the same numbers
    assert np.array_equal(active, run(made.base, feeds))
    switched_on = with_row(made.both, made.row(10), active=True)
    assert np.array_equal(run(switched_on, feeds), run(made.whole, {**feeds, **made.row(10), **default_active(True)}))


def test_the_switch_is_what_an_onnx_adapter_can_hold(base):
    """float32 of one axis: ONNX Runtime refuses booleans and scalars in its adapter files."""
    made = Made(base)
    names = [value.name for value in made.both.graph.inputs]
    assert names == ["x", *made.layout.shapes(), "adapter_strength", "adapter_active"]
    switch = made.both.graph.inputs[-1]
    assert (switch.dtype, list(switch.shape)) == (ir.DataType.FLOAT, [1])
    assert [node.op_type for node in made.both.graph] == ["Cast", "If"]
    assert not made.both.graph.initializers


def test_every_name_is_there_once(base):
    made = Made(base)
    names = [value.name for value in made.whole.graph.inputs]
    for graph in (made.whole.graph, *made.whole.graph.subgraphs()):
        inner = graph is not made.whole.graph
        names += [value.name for value in graph.initializers.values()] if inner else []
        names += [output.name for node in graph for output in node.outputs]
        assert all(node.name for node in graph)
    assert len(names) == len(set(names))


def test_neither_graph_is_changed(base, as_bytes):
    made = Made(base)
    before = as_bytes(made.base), as_bytes(made.slots), as_bytes(base)
    tensors = {name: value.const_value for name, value in made.base.graph.initializers.items()}
    again = with_idle_branch(made.base, made.slots)
    with_row(again, made.zero)
    idle_branch(again)
    assert [tensor.name for tensor in tensors.values()] == list(tensors)
    assert (as_bytes(made.base), as_bytes(made.slots), as_bytes(base)) == before
    assert as_bytes(again) == as_bytes(made.both)


def test_equal_weights_lie_on_disk_once(base, feeds, tmp_path):
    made = Made(base)
    for name, options in (("apart", {}), ("shared", {"share_equal": True}), ("base", {})):
        (tmp_path / name).mkdir()
        save_graph(made.base if name == "base" else made.whole, tmp_path / name, **options)
    sizes = {path.name: (path / "model.onnx.data").stat().st_size for path in tmp_path.iterdir()}
    own = 4 * sum(made.zero[name].size for name in made.zero if made.zero[name].nbytes > 1024)
    assert sizes["shared"] == sizes["base"] + own
    assert sizes["apart"] > 1.9 * sizes["base"]
    path = tmp_path / "shared" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    stored = OnnxRuntimeRunner(path, threads=1)
    for given in (feeds, {**feeds, **made.row(10), **default_active(True)}):
        assert np.array_equal(stored.run(given)["logits"], run(made.whole, given))
    # read back, the branch is the base still
    assert np.array_equal(run(idle_branch(load_graph(path)), feeds), run(made.base, feeds))
    # and what was saved is in memory as it was
    assert all(
        not isinstance(v.const_value, ir.ExternalTensor) for g in made.whole.graphs() for v in g.initializers.values()
    )


def test_tensors_of_equal_bytes_and_unequal_shape_or_type_are_two(builder, tmp_path):
    b = builder()
    x = b.input("x", "batch", 20)
    for name, shape in (("a", (20, 30)), ("b", (30, 20)), ("c", (20, 30))):
        x = b.op("MatMul", x, b.const(name, np.zeros(shape)), out=f"after_{name}")
    y = b.op("Identity", x, out="logits")
    model = b.model(y)
    save_graph(model, tmp_path, share_equal=True)
    assert (tmp_path / "model.onnx.data").stat().st_size == 2 * 4 * 600
    assert run(load_graph(tmp_path / "model.onnx"), {"x": numbers(0, 2, 20)}).shape == (2, 30)


def test_a_row_with_more_labels_than_the_base(base, feeds):
    made = Made(base, max_labels=5)
    idle, more = run(made.whole, feeds), run(made.whole, {**feeds, **made.row(10, labels=5), **default_active(True)})
    assert idle.shape == (5, 3) and more.shape == (5, 5)
    fewer = run(made.whole, {**feeds, **made.row(10, labels=2), **default_active(True)})
    assert np.isneginf(fewer[:, 2:]).all() and np.isfinite(fewer[:, :2]).all()
    assert str(made.whole.graph.outputs[0].shape[0]) == "batch"
    assert not isinstance(made.whole.graph.outputs[0].shape[1], int)


def test_a_branch_makes_its_outputs_itself(builder, feeds):
    """An output that is an input, a constant, or the same value twice, is none of a branch."""
    b = builder()
    x = b.input("x", "batch", 20)
    h = b.op("MatMul", x, b.const("w", numbers(1, 20, 20)), site="fc", out="logits")
    base = b.model(h)
    layout = make_layout(base, {"a": Adapter("vefa", {"fc": Edit(lam=numbers(2, 20))}, base=BASE)})
    slots = add_slots(base, layout)
    for model in (base, slots):
        model.graph.outputs.append(model.graph.inputs[0])
    whole = with_row(with_idle_branch(base, slots), base_row(layout, {}))
    assert [value.name for value in whole.graph.outputs] == ["logits", "x"]


def test_graphs_that_do_not_belong_together_are_refused(base):
    made = Made(base)
    other = made.slots.clone()
    other.graph.outputs[0].name = "scores"
    with pytest.raises(PlanError, match="the base graph answers 'logits', the slot graph 'scores'"):
        with_idle_branch(made.base, other)
    other = made.slots.clone()
    other.graph.inputs[0].name = "y"
    with pytest.raises(PlanError, match="the slot graph has no input 'x'"):
        with_idle_branch(made.base, other)
    other = made.slots.clone()
    other.graph.opset_imports[""] = 17
    with pytest.raises(PlanError, match=r"opset 20 of 'ai.onnx', the slot graph 17; use one fusion for both"):
        with_idle_branch(made.base, other)
    with pytest.raises(PlanError, match="has an idle branch already"):
        with_idle_branch(made.base, made.both)
    with pytest.raises(PlanError, match="no idle branch; export it with --slots"):
        idle_branch(with_row(made.slots, made.zero))


def swap_sites(whole: ir.Model) -> None:
    """The λ and δ of one site where the other's belong."""
    branch = next(node for node in whole.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    scale = next(node for node in branch if node.op_type == "Mul" and "deployfa.site" in node.metadata_props)
    one = scale.inputs[1]
    rolled = ir.node("Neg", [one], name="fault")
    rolled.outputs[0].name, rolled.outputs[0].type = "fault", one.type
    branch.insert_before(scale, rolled)
    scale.replace_input_with(1, rolled.outputs[0])


def test_a_fault_in_the_slots_shows_when_active_and_never_when_idle(base, feeds):
    made = Made(base)
    broken = made.whole.clone()
    swap_sites(broken)
    given = {**feeds, **made.row(10), **default_active(True)}
    assert np.array_equal(run(broken, feeds), run(made.whole, feeds))
    assert not np.allclose(run(broken, given), run(made.whole, given))


def test_the_data_file_of_a_shared_graph_is_whole(base, tmp_path: Path):
    path = save_graph(Made(base).whole, tmp_path, share_equal=True)
    data = Path(f"{path}.data")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match="reaches past the end"):
        load_graph(path)
