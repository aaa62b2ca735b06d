"""Norms that exporters write in pieces stay in float32; and what happens when one is forced to float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.graph.evaluate import evaluate
from deployfa.parity.measures import normwise
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

from .typed import nodes, typed, types

#: The operators of ``norm`` below that are part of one.
PIECES = frozenset({"Add", "Div", "Mul", "Pow", "Reciprocal", "ReduceMean", "ReduceSumSquare", "Sqrt", "Sub"})
K = 16


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def norm(b, x, how, seed=0):
    """LayerNorm or RMSNorm of the last axis, in the ways in which they are written."""
    gamma, beta = b.const(f"gamma{seed}", 1 + 0.1 * numbers(seed, K)), b.const(f"beta{seed}", numbers(seed + 1, K))
    two, epsilon = b.const(f"two{seed}", np.array(2.0)), b.const(f"epsilon{seed}", np.array(1e-6))
    axes = b.const(f"axes{seed}", np.array([-1]))
    centred = x if how.startswith("rms") else b.op("Sub", x, b.op("ReduceMean", x, axes))
    square = b.op("Mul", centred, centred) if "mul" in how else b.op("Pow", centred, two)
    if "sum" in how:
        total = b.op("ReduceSumSquare", centred, axes)
        variance = b.op("Mul", total, b.const(f"share{seed}", np.array(1.0 / K)))
    else:
        variance = b.op("ReduceMean", square, axes)
    deviation = b.op("Sqrt", b.op("Add", variance, epsilon))
    inverse = "reciprocal" in how
    h = b.op("Mul", centred, b.op("Reciprocal", deviation)) if inverse else b.op("Div", centred, deviation)
    h = b.op("Mul", gamma, h)
    return h if how.startswith("rms") else b.op("Add", h, beta)


def rounded(made, feeds):
    """What the typed graph answers with every value rounded to its type."""
    return evaluate(made.model, [feeds], dtype="float32")[0]["y"]


def run(made, feeds):
    runner = OnnxRuntimeRunner(ir.to_proto(made.model).SerializeToString(), threads=1, optimize=False)
    return runner.run(feeds)["y"]


HOW = ("rms", "rms mul", "rms reciprocal", "rms sum", "layer", "layer mul", "layer reciprocal", "layer mul reciprocal")


def network(builder, how, scale=1.0):
    """``relu(norm(x U) V) + x U`` twice, and a layer: the residual sums stay low."""
    b = builder()
    h = b.op("MatMul", b.input("x", "batch", K), b.const("u", scale * numbers(1, K, K) / K**0.5))
    for at in (10, 20):
        n = norm(b, h, how, seed=at)
        h = b.op("Max", h, b.op("MatMul", n, b.const(f"weight{at}", numbers(at + 5, K, K) / K**0.5)))
    return b.model(b.op("MatMul", norm(b, h, how, seed=30), b.const("w", numbers(3, K, K)), out="y"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_piece_of_a_norm_stays(builder, how, precision):
    made = typed(network(builder, how), precision)
    low = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]
    for piece in PIECES:
        assert set(types(made, piece)) <= {"FLOAT"}, piece
    assert types(made, "MatMul") == [low] * 4 and types(made, "Max") == [low] * 2
    # x, what each norm reads (once, however often) and makes, and the answer
    assert len(types(made, "Cast")) == 1 + 2 * 3 + 1


@pytest.mark.parametrize("how", HOW)
def test_a_norm_that_is_forced_overflows_and_is_seen(builder, how):
    """Features of about a thousand: their squares are beyond 65504, and so is nothing else."""
    model = network(builder, how, scale=1000.0)
    feeds = {"x": numbers(4, 64, K)}
    truth = evaluate(model, [feeds])[0]["y"]
    # at most u for every layer's input, weight and answer, and for what is between two layers
    limit = 16 * 2.0**-11
    kept, forced = typed(model), typed(model, force_low=PIECES)
    assert set(types(forced, "Mul") + types(forced, "Pow") + types(forced, "Sqrt")) == {"FLOAT16"}
    for found in (rounded(kept, feeds), run(kept, feeds)):
        assert normwise(found.astype(np.float64), truth) <= limit
    with np.errstate(all="ignore"):
        found = rounded(forced, feeds).astype(np.float64)
    # all features divided by infinity: nothing is left of them
    assert not normwise(found, truth) <= 0.5


def test_onnxruntime_on_a_cpu_does_not_see_an_overflow_within_a_chain(builder):
    """It leaves out casts between nodes that it computes in float32: why the check above is not its."""
    model = network(builder, "rms", scale=1000.0)
    feeds = {"x": numbers(4, 64, K)}
    truth = evaluate(model, [feeds])[0]["y"]
    forced = typed(model, force_low=PIECES)
    assert normwise(run(forced, feeds).astype(np.float64), truth) <= 16 * 2.0**-11


def test_a_layer_norm_in_one_piece_that_is_forced_is_seen(builder):
    b = builder()
    h = b.op("MatMul", b.input("x", "batch", K), b.const("u", 1000 * numbers(1, K, K) / K**0.5))
    h = b.op("LayerNormalization", h, b.const("gamma", 1 + 0.1 * numbers(2, K)), b.const("beta", numbers(3, K)))
    model = b.model(b.op("MatMul", h, b.const("w", numbers(4, K, K)), out="y"))
    feeds = {"x": numbers(5, 64, K)}
    truth = evaluate(model, [feeds])[0]["y"]
    kept, forced = typed(model), typed(model, force_low=frozenset({"LayerNormalization"}))
    assert normwise(rounded(kept, feeds).astype(np.float64), truth) <= 16 * 2.0**-11
    with np.errstate(all="ignore"):
        assert not normwise(rounded(forced, feeds).astype(np.float64), truth) <= 0.5


def test_a_group_norm_written_with_an_instance_norm_stays(builder):
    b = builder()
    x = b.input("x", 2, 4, 3, 3)
    h = b.op("Conv", x, b.const("w", numbers(1, 4, 4, 1, 1)))
    one, zero = b.const("one", np.ones(2)), b.const("zero", np.zeros(2))
    h = b.op("Reshape", h, b.const("shape", np.array([2, 2, -1])))
    h = b.op("InstanceNormalization", h, one, zero)
    h = b.op("Reshape", h, b.const("back", np.array([2, 4, 3, 3])))
    h = b.op("Add", b.op("Mul", h, b.const("gamma", numbers(2, 4, 1, 1))), b.const("beta", numbers(3, 4, 1, 1)))
    made = typed(b.model(b.op("Conv", h, b.const("v", numbers(4, 4, 4, 1, 1)))))
    assert types(made, "Conv") == ["FLOAT16"] * 2
    assert types(made, "Mul") == types(made, "Add") == types(made, "InstanceNormalization") == ["FLOAT"]
    assert types(made, "Reshape") == ["FLOAT16", "FLOAT"], "one cast before the norm, one after β"


def test_a_length_that_is_divided_by_stays(builder):
    """CLIP's embeddings: ``x / max(‖x‖, 1e-12)``; 1e-12 is zero in float16."""
    b = builder()
    h = b.op("MatMul", b.input("x", 2, 4), b.const("w", numbers(1, 4, 4)))
    length = b.op("Max", b.op("ReduceL2", h, keepdims=1), b.const("least", np.array(1e-12)))
    made = typed(b.model(b.op("Div", h, b.op("Expand", length, b.const("shape", np.array([2, 4]))))))
    assert types(made, "Div") == types(made, "Max") == types(made, "ReduceL2") == ["FLOAT"]


def test_a_gate_of_means_is_no_norm(builder):
    """Squeeze and excitation: a mean over pixels, two layers, a product with the features."""
    b = builder()
    h = b.op("Conv", b.input("x", 1, 4, 6, 6), b.const("w", numbers(1, 4, 4, 1, 1)))
    gate = b.op("Sigmoid", b.op("Conv", b.op("GlobalAveragePool", h), b.const("v", numbers(2, 4, 4, 1, 1))))
    made = typed(b.model(b.op("Conv", b.op("Mul", h, gate), b.const("u", numbers(3, 4, 4, 1, 1)))))
    assert types(made, "GlobalAveragePool") == ["FLOAT"]
    assert types(made, "Conv") == ["FLOAT16"] * 3 and types(made, "Mul") == types(made, "Sigmoid") == ["FLOAT16"]


def test_a_mean_over_tokens_divides_in_float32(builder):
    b = builder()
    x, mask = b.input("x", 2, 7, 4), b.input("mask", 2, 7, 1, dtype=ir.DataType.INT64)
    h = b.op("MatMul", x, b.const("w", numbers(1, 4, 4)))
    m = b.op("Cast", mask, to=int(ir.DataType.FLOAT))
    axes = b.const("axes", np.array([1]))
    total, count = b.op("ReduceSum", b.op("Mul", h, m), axes), b.op("ReduceSum", m, axes)
    made = typed(b.model(b.op("MatMul", b.op("Div", total, count), b.const("v", numbers(2, 4, 4)))))
    assert types(made, "Div") == ["FLOAT"] and types(made, "ReduceSum") == ["FLOAT"] * 2
    assert types(made, "Mul") == ["FLOAT16"] and types(made, "MatMul") == ["FLOAT16"] * 2
    # the mask in both types, each straight from its integers
    casts = [(node.inputs[0].name, node.outputs[0].dtype.name) for node in nodes(made, "Cast")]
    assert {("mask", "FLOAT16"), ("mask", "FLOAT")} <= set(casts)
