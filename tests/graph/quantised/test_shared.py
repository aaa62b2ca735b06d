"""Quantised layers, built by hand, that share what a fold changes: against the side ops."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import OWN_WEIGHT, PRODUCER, SIDE_OP

B, S, K = 2, 3, 4
#: Each scale is rounded once to float32, or twice for two factors, in sums of fewer than 100 terms.
ROUNDING = 2.0**-24 * 8


class Layers:
    """QDQ layers on fed inputs, and sites whose weights are fed, so that they fold only into the layers before."""

    def __init__(self, builder):
        self.rng = np.random.default_rng(4)
        self.g = builder()
        self.feeds = {}

    def feed(self, name, *shape):
        self.feeds[name] = self.rng.standard_normal(shape).astype(np.float32)
        return self.g.input(name, *shape)

    def integers(self, name, array):
        tensor = ir.tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        self.g.initializers.append(value)
        return value

    def weight(self, name):
        q = self.integers(f"{name}.q", self.rng.integers(-100, 100, (K, K)).astype(np.int8))
        return self.g.op("DequantizeLinear", q, self.scale(f"{name}.s"), axis=1)

    def bias(self, name):
        q = self.integers(f"{name}.bias_q", self.rng.integers(-9000, 9000, K).astype(np.int32))
        return self.g.op("DequantizeLinear", q, self.scale(f"{name}.bias_s"), axis=0)

    def scale(self, name, *shape):
        return self.g.const(name, self.rng.uniform(0.0001, 0.0002, shape or (K,)))

    def layer(self, site, x, weight, bias):
        return self.g.op("Add", self.g.op("MatMul", x, weight, site=site), bias, site=site)

    def reader(self, site, value):
        return self.g.op("MatMul", value, self.feed(f"{site}.weight", K, 2), site=site, out=f"y_{site}")

    def planned(self, edits, *outputs):
        """(edits of the plan, what its graph is off by, what the base is off by): relative to the side ops."""
        model, adapter = self.g.model(*outputs), Adapter("vefa", edits)
        plan = make_plan(model, adapter)
        graphs = [
            apply_adapter(model, adapter, make_plan(model, adapter, placement="side-op")),
            apply_adapter(model, adapter, plan),
            model,
        ]
        expected, *found = (evaluate(graph, [self.feeds])[0] for graph in graphs)
        off = [
            max(np.linalg.norm(each[n] - expected[n]) / np.linalg.norm(expected[n]) for n in expected) for each in found
        ]
        return {edit.site: edit for edit in plan.edits}, *off


@pytest.fixture
def made(builder):
    return Layers(builder)


def lam(seed=3):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, K).astype(np.float32)


def test_a_quantised_bias_of_a_layer_called_twice_is_scaled_once(made):
    weight, bias = made.weight("v"), made.bias("v")
    values = [made.layer("v", made.feed(name, B, S, K), weight, bias) for name in ("x1", "x2")]
    outputs = [made.reader(site, value) for site, value in zip("qk", values, strict=True)]
    edits, off, base = made.planned({"q": Edit(lam=lam()), "k": Edit(lam=lam())}, *outputs)
    assert {edit.placement for edit in edits.values()} == {PRODUCER}
    assert off <= ROUNDING < base


def test_a_quantised_bias_that_another_layer_reads_stays(made):
    x, bias = made.feed("x", B, S, K), made.bias("v")
    first, second = (made.layer(site, x, made.weight(site), bias) for site in "vu")
    edits, off, base = made.planned({"q": Edit(lam=lam())}, made.reader("q", first), made.g.op("Neg", second, out="o"))
    assert edits["q"].placement == SIDE_OP
    assert "bias of the layer before is quantised and shared with another layer" in edits["q"].reason
    assert off <= ROUNDING < base


@pytest.mark.parametrize("shared", [False, True])
def test_factors_of_inputs_and_outputs_go_into_scales_of_each(made, shared):
    made.g.opsets = {"": 21}
    x, scale = made.feed("x", B, S, K), made.scale("s", K, K)

    def layer(site):
        q = made.integers(f"{site}.q", made.rng.integers(-100, 100, (K, K)).astype(np.int8))
        weight = made.g.op("DequantizeLinear", q, scale, axis=0, block_size=1)
        return made.g.op("MatMul", x, weight, site=site, out=f"y_{site}")

    outputs = [layer("q"), layer("k")] if shared else [layer("q")]
    edits, off, base = made.planned({"q": Edit(lam=lam(), output_scale=lam(5))}, *outputs)
    assert edits["q"].placement == OWN_WEIGHT
    assert off <= ROUNDING < base


def multiplied(made, zero=None, scale=None):
    """``Mul(Cast(q) - zero, scale)``; one scale for all if none is given."""
    numbers = made.g.op("Cast", made.integers("v.q", made.rng.integers(-100, 100, (K, K)).astype(np.int8)), to=1)
    if zero is not None:
        numbers = made.g.op("Sub", numbers, made.g.const("v.zero", zero))
    return made.g.op("Mul", numbers, made.g.const("v.s", np.array(0.013) if scale is None else scale))


def test_one_scale_takes_no_factors_of_inputs_and_outputs_both(made):
    y = made.g.op("MatMul", made.feed("x", B, S, K), multiplied(made), site="v", out="y")
    edits, off, base = made.planned({"v": Edit(lam=lam(), output_scale=lam(5))}, y)
    assert edits["v"].placement == SIDE_OP and "no factors of inputs and outputs both" in edits["v"].reason
    assert off <= ROUNDING < base


def test_one_scale_that_the_layer_takes_is_not_there_for_the_next(made):
    v = made.g.op("MatMul", made.feed("x", B, S, K), multiplied(made), site="v")
    edits, off, base = made.planned({"v": Edit(lam=lam()), "q": Edit(lam=lam(5))}, made.reader("q", v))
    assert (edits["v"].placement, edits["q"].placement) == (OWN_WEIGHT, SIDE_OP)
    assert "layer before, 'v', is quantised with one scale, which its own 1+λ takes" in edits["q"].reason
    assert off <= ROUNDING < base


@pytest.mark.parametrize("shape", [(K, 1), (1, K), (K,), (1,), (K, K)])
def test_zero_points_lie_as_they_broadcast(made, shape):
    zero, scale = made.rng.integers(-50, 50, shape).astype(np.float32), made.rng.uniform(0.01, 0.02, (1, K))
    y = made.g.op("MatMul", made.feed("x", B, S, K), multiplied(made, zero, scale), site="v", out="y")
    edits, off, base = made.planned({"v": Edit(delta=lam())}, y)
    assert edits["v"].placement == OWN_WEIGHT
    assert off <= ROUNDING < base


def test_one_scale_of_an_integer_product_becomes_one_for_each_output(made):
    """Also in what the graph says of its shapes: ONNX refuses a file that contradicts itself."""
    quantizer = ir.node("DynamicQuantizeLinear", [made.feed("x", B, S, K)], num_outputs=3)
    for name, value in zip(("q", "s", "z"), quantizer.outputs, strict=True):
        value.name, value.type = name, ir.TensorType(made.g.onnx if name == "s" else ir.DataType.UINT8)
    made.g.nodes.append(quantizer)
    q, scale, zero = quantizer.outputs
    weight = made.integers("v.q", made.rng.integers(-100, 100, (K, K)).astype(np.int8))
    product = made.g.op("MatMulInteger", q, weight, zero, site="v")
    product.type = ir.TensorType(ir.DataType.INT32)
    scales = made.g.op("Mul", scale, made.g.const("v.s", np.array(0.013)), site="v")
    v = made.g.op("Mul", made.g.op("Cast", product, to=1, site="v"), scales, site="v")
    model, adapter = made.g.model(made.reader("o", v)), Adapter("vefa", {"o": Edit(lam=lam())})
    plan = make_plan(model, adapter)
    assert plan.count(PRODUCER) == 1
    onnx.checker.check_model(ir.to_proto(apply_adapter(model, adapter, plan)), full_check=True)


def test_many_matrices_with_a_scale_for_each_column(made):
    """Spelled out in floats for a side op: an adapter of nothing changes nothing."""
    g, rng = made.g, made.rng
    scales = {name: g.const(name, np.array(0.02)) for name in ("x_scale", "y_scale")}
    zero = made.integers("zero", np.array(128, np.uint8))
    q = g.op("QuantizeLinear", made.feed("x", B, S, K), scales["x_scale"], zero)
    weight = made.integers("e.q", rng.integers(-100, 100, (B, K, K)).astype(np.int8))
    columns = g.const("w_scale", rng.uniform(0.01, 0.02, K)), made.integers("w_zero", np.zeros(K, np.int8))
    y = g.op("QLinearMatMul", q, scales["x_scale"], zero, weight, *columns, scales["y_scale"], zero, site="e")
    q.type = y.type = ir.TensorType(ir.DataType.UINT8)
    model = g.model(g.op("DequantizeLinear", y, scales["y_scale"], zero, out="y"))
    adapter = Adapter("vefa", {"e": Edit(lam=np.zeros(K, np.float32))})
    plan = make_plan(model, adapter)
    assert plan.count(SIDE_OP) == 1
    expected, found = (evaluate(graph, [made.feeds])[0]["y"] for graph in (model, apply_adapter(model, adapter, plan)))
    assert np.array_equal(found, expected)
