"""Which nodes of a graph become float16 or bfloat16, and what comes of its values, weights, ends and branches."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from deployfa.errors import GraphError, InputError
from deployfa.graph import precision_numbers
from deployfa.graph.evaluate import evaluate
from deployfa.graph.precision import OperatorRow, check_typed, type_graph
from deployfa.graph.storage import load_graph, save_graph
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

from .typed import LOW, nodes, typed, types

PRECISIONS = ("fp16", "bf16")


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parse(text):
    """A model from ONNX's own text form, with the types that inference finds."""
    model = onnx.parser.parse_model(text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def run(model, feeds):
    inside = ir.external_data.load_to_model(model.clone())
    return OnnxRuntimeRunner(ir.to_proto(inside).SerializeToString(), threads=1, optimize=False).run(feeds)


@pytest.fixture
def layer(builder):
    """``relu(x W + c)`` and its softmax."""
    b = builder()
    x = b.input("x", "batch", 6)
    h = b.op("Add", b.op("MatMul", x, b.const("w", numbers(1, 6, 5))), b.const("c", numbers(2, 5)))
    h = b.op("Relu", h)
    return b.model(h, b.op("Softmax", h, out="p"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_are_low_and_softmax_is_not(layer, precision):
    made = typed(layer, precision)
    low = LOW[precision].name
    assert types(made, "MatMul") == types(made, "Add") == types(made, "Relu") == [low]
    assert types(made, "Softmax") == ["FLOAT"]
    assert made.low == {"Add": 1, "MatMul": 1, "Relu": 1}
    assert {op: (k.count, k.reason) for op, k in made.kept.items()} == {"Softmax": (1, "a softmax")}
    # x goes down once; what the layer answers is an output, and what the softmax reads: up once
    assert sorted(types(made, "Cast")) == sorted([low, "FLOAT"])
    weight = made.model.graph.initializers["w"]
    assert weight.dtype == LOW[precision] and set(made.model.graph.initializers) == {"w", "c"}
    assert weight.const_value.tobytes() == numbers(1, 6, 5).astype(LOW[precision].numpy()).tobytes()


def test_the_table_says_what_stayed_and_why(layer):
    made = type_graph(layer, "fp16")
    assert made.rows() == [
        OperatorRow(op_type="Add", low=1, kept=0),
        OperatorRow(op_type="MatMul", low=1, kept=0),
        OperatorRow(op_type="Relu", low=1, kept=0),
        OperatorRow(op_type="Softmax", low=0, kept=1, reason="a softmax"),
    ]
    assert "| Softmax | 0 | 1 | a softmax |" in made.table().splitlines()
    assert msgspec.json.decode(msgspec.json.encode(made.rows()), type=list[OperatorRow]) == made.rows()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("Exp", {}), ("Log", {}), ("Cos", {}), ("Sin", {}), ("LogSoftmax", {}), ("ReduceSum", {}), ("ReduceMean", {}),
        ("ReduceL2", {}), ("ReduceLogSumExp", {}), ("ReduceSumSquare", {}), ("Softplus", {}), ("GlobalAveragePool", {}),
        ("LpNormalization", {}), ("MeanVarianceNormalization", {}),
    ],
)  # fmt: skip
def test_what_sums_and_what_explodes_stays(builder, precision, op_type, attributes):
    b = builder()
    x = b.input("x", 2, 3, 4, 4)
    h = b.op("Conv", x, b.const("w", numbers(1, 3, 3, 1, 1)))
    h = b.op(op_type, h, **attributes)
    y = b.op("Mul", h, b.op("Relu", h))
    # ONNX's own inference fails on the last of these, in float32 too
    made = typed(b.model(y), precision, full=op_type != "MeanVarianceNormalization")
    assert types(made, op_type) == ["FLOAT"] and made.kept[op_type].count == 1
    assert types(made, "Conv") == [LOW[precision].name]


def test_every_norm_operator_stays(builder):
    b = builder()
    b.opsets = {"": 23}
    x = b.input("x", 2, 4, 3)
    gamma, beta = b.const("gamma", numbers(1, 3)), b.const("beta", numbers(2, 3))
    four, more = b.const("four", numbers(3, 4)), b.const("more", np.abs(numbers(4, 4)))
    h = b.op("MatMul", x, b.const("w", numbers(5, 3, 3)))
    y = [
        b.op("LayerNormalization", h, gamma, beta),
        b.op("RMSNormalization", h, gamma),
        b.op("GroupNormalization", h, four, four, num_groups=2),
        b.op("InstanceNormalization", h, four, four),
        b.op("BatchNormalization", h, four, four, more, more),
    ]
    total = y[0]
    for other in y[1:]:
        total = b.op("Add", total, other)
    model = b.model(total)
    # inference leaves the output without a shape, which the full check does not take
    made = typed(model, full=False)
    assert {op: kept.count for op, kept in made.kept.items()} == {value.producer().op_type: 1 for value in y}
    assert types(made, "MatMul") == ["FLOAT16"] and types(made, "Add") == ["FLOAT16"] * 4
    forced = typed(model, full=False, force_low=frozenset({"LayerNormalization"}))
    assert types(forced, "LayerNormalization") == ["FLOAT16"] and types(forced, "RMSNormalization") == ["FLOAT"]


def test_a_weight_that_both_read_is_stored_in_both_types(builder):
    """Exporters merge equal tensors: a zero bias is a norm's β too."""
    b = builder()
    x = b.input("x", 2, 5)
    zero, gamma = b.const("zero", np.zeros(5)), b.const("gamma", np.ones(5))
    h = b.op("Add", b.op("MatMul", x, b.const("w", numbers(1, 5, 5))), zero)
    h = b.op("LayerNormalization", h, gamma, zero)
    y = b.op("Add", b.op("MatMul", h, b.const("v", numbers(2, 5, 5))), zero)
    made = typed(b.model(y))
    stored = {name: value.dtype.name for name, value in made.model.graph.initializers.items()}
    assert stored == {
        "zero": "FLOAT", "zero/float16": "FLOAT16", "gamma": "FLOAT", "w": "FLOAT16", "v": "FLOAT16"
    }  # fmt: skip


def test_ends_keep_their_types_and_names(builder):
    """Outputs that are low inside, that another node reads, that are an input, and that are stored."""
    b = builder()
    x, lam = b.input("x", 2, 5), b.input("lam", 5, default=np.ones(5))
    inner = b.op("Relu", b.op("Mul", x, lam), out="inner")
    last = b.op("MatMul", inner, b.const("w", numbers(1, 5, 5)), out="last")
    stored = b.const("stored", numbers(2, 5))
    y = b.op("Add", last, stored)
    made = typed(b.model(inner, last, y, b.op("Identity", x), b.op("Identity", stored)))
    assert types(made, "Mul") == types(made, "Relu") == types(made, "MatMul") == ["FLOAT16"]
    # an adapter's tensor may be fed: it stays float32, default and all, and is cast inside
    assert made.model.graph.initializers["lam"].dtype == ir.DataType.FLOAT
    feeds = {"x": numbers(3, 2, 5), "lam": numbers(4, 5)}
    found = run(made.model, feeds)
    h = np.maximum(feeds["x"] * feeds["lam"], 0)
    # three roundings of numbers, and two of products, each at most 2^-11
    assert np.abs(found["inner"] - h).max() <= 3 * 2.0**-11 * np.abs(h).max()
    assert all(array.dtype == np.float32 for array in found.values())
    assert not np.array_equal(found["inner"], run(made.model, {"x": feeds["x"]})["inner"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_mask_of_the_lowest_float_stays_float32(builder, precision):
    """float32's lowest is infinite in both types, and the softmax of a row of infinities is NaN."""
    b = builder()
    x, mask = b.input("x", "batch", 4), b.input("mask", "batch", 4, dtype=ir.DataType.INT64)
    scores = b.op("MatMul", x, b.const("w", numbers(1, 4, 4)))
    hidden = b.op("Sub", b.const("one", np.ones(())), b.op("Cast", mask, to=int(ir.DataType.FLOAT)))
    added = b.op("Mul", hidden, b.const("lowest", np.array(np.finfo(np.float32).min)))
    p = b.op("Softmax", b.op("Add", scores, added))
    model = b.model(b.op("MatMul", p, b.const("v", numbers(2, 4, 4)), out="y"))
    made = typed(model, precision)
    assert types(made, "Mul") == types(made, "Sub") == types(made, "Add") == ["FLOAT"]
    assert types(made, "MatMul") == [LOW[precision].name] * 2
    feeds = {"x": numbers(3, 3, 4), "mask": np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])}
    found = evaluate(made.model, [feeds], dtype="float32")[0]["y"]
    truth = evaluate(model, [feeds])[0]["y"]
    # a score is rounded by at most u, three terms of rounded factors; a softmax passes on at most half of a difference
    u = float(ml_dtypes.finfo(LOW[precision].numpy()).eps) / 2
    assert np.abs(found - truth).max() <= 8 * u * np.abs(numbers(1, 4, 4)).sum() * np.abs(numbers(2, 4, 4)).max()


def test_fills_are_clamped_where_they_are_forced(builder):
    """What would be minus infinity by rounding is the lowest finite number; an infinity that was meant stays one."""
    b = builder()
    x, chosen = b.input("x", 2, 4), b.input("chosen", 2, 4, dtype=ir.DataType.BOOL)
    h = b.op("MatMul", x, b.const("w", numbers(1, 4, 4)))
    h = b.op("Where", chosen, h, b.const("lowest", np.array(np.finfo(np.float32).min)))
    h = b.op("Where", chosen, h, b.const("minus", np.array(-np.inf)))
    model = b.model(b.op("Softmax", h))
    kept = typed(model)
    assert types(kept, "Where") == ["FLOAT", "FLOAT"] and "lowest" in kept.model.graph.initializers
    for precision, lowest in (("fp16", -65504.0), ("bf16", -3.3895314e38)):
        made = typed(model, precision, force_low=frozenset({"Where"}))
        assert types(made, "Where") == [LOW[precision].name] * 2
        stored = {n: float(v.const_value.numpy()) for n, v in made.model.graph.initializers.items() if n != "w"}
        assert stored == {"lowest": pytest.approx(lowest, rel=1e-7), "minus": -np.inf}


@pytest.mark.parametrize(
    ("number", "stays"), [(1e6, True), (65504.0, False), (1e-12, True), (1e-7, False), (0.0, False)]
)
def test_a_number_that_does_not_fit_keeps_its_reader(builder, number, stays):
    b = builder()
    x = b.input("x", 2, 4)
    h = b.op("MatMul", x, b.const("w", numbers(1, 4, 4)))
    h = b.op("Mul", h, b.const("c", np.array(number)))
    model = b.model(b.op("MatMul", h, b.const("v", numbers(2, 4, 4))))
    made = typed(model)
    assert types(made, "Mul") == ["FLOAT" if stays else "FLOAT16"]
    assert types(made, "MatMul") == ["FLOAT16"] * 2
    assert typed(model, "bf16").low["Mul"] == 1


def test_what_may_be_as_large_as_such_a_number_stays_until_it_is_squashed(builder):
    b = builder()
    x, chosen = b.input("x", 2, 4), b.input("chosen", 2, 4, dtype=ir.DataType.BOOL)
    h = b.op("MatMul", x, b.const("w", numbers(1, 4, 4)))
    h = b.op("Where", chosen, h, b.const("low", np.array(-1e9)))
    h = b.op("Neg", b.op("ReduceMax", b.op("Neg", h), keepdims=1))
    made = typed(b.model(b.op("Relu", b.op("Tanh", h))))
    assert types(made, "Where") == types(made, "ReduceMax") == ["FLOAT"] and types(made, "Neg") == ["FLOAT"] * 2
    assert types(made, "Tanh") == types(made, "Relu") == ["FLOAT16"]


def test_a_weight_beyond_the_range_keeps_its_layer(builder):
    b = builder()
    x = b.input("x", 2, 4)
    w = numbers(1, 4, 4)
    w[1, 2] = 1e5
    h = b.op("Gemm", x, b.op("Transpose", b.const("w", w)))
    made = typed(b.model(b.op("Gemm", h, b.const("v", numbers(2, 4, 4)))))
    assert types(made, "Gemm") == ["FLOAT", "FLOAT16"] and types(made, "Transpose") == ["FLOAT"]


def test_positions_stay_exact_on_their_way_to_an_angle(builder):
    """float16 counts to 2048 and has 11 bits of an angle of thousands of radians."""
    b = builder()
    x, ids = b.input("x", "batch", 8), b.input("ids", "batch", dtype=ir.DataType.INT64)
    places = b.op("Unsqueeze", b.op("Cast", ids, to=int(ir.DataType.FLOAT)), b.const("axes", np.array([1])))
    angles = b.op("MatMul", places, b.const("frequencies", 10.0 ** -np.arange(4.0)[None]))
    angles = b.op("Concat", angles, angles, axis=-1)
    y = b.op("Mul", b.op("Mul", b.op("Cos", angles), x), b.op("Sin", angles), out="y")
    model = b.model(y)
    made = typed(model)
    assert types(made, "MatMul") == types(made, "Concat") == types(made, "Cos") == types(made, "Sin") == ["FLOAT"]
    assert types(made, "Mul") == ["FLOAT16"] * 2
    feeds = {"x": numbers(1, 3, 8), "ids": np.array([17, 2049, 30001])}
    truth = evaluate(model, [feeds])[0]["y"]
    # x, two factors and two products, each rounded once; the factors are at most 1
    limit = 5 * 2.0**-11 * np.abs(feeds["x"]).max()
    assert np.abs(run(made.model, feeds)["y"] - truth).max() <= limit
    forced = typed(model, force_low=frozenset({"MatMul", "Unsqueeze"}))
    assert np.abs(run(forced.model, feeds)["y"] - truth).max() > 10 * limit


def test_casts_come_from_what_was_cast():
    """From integers straight to float16; from float16 not at all; CastLike and casts to the same type are spelt out."""
    model = parse("""
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (int64[n] i, float16[n] h, float[n] x, double[n] d) => (float[n] y, double[n] e) {
            a = Cast <to = 1> (i)
            b = Cast <to = 1> (h)
            c = CastLike (d, x)
            s = Cast <to = 1> (x)
            t = Mul (a, s)
            u = Mul (t, b)
            v = Add (u, c)
            w = Cast <to = 10> (v)
            y = Cast <to = 1> (w)
            e = Cast <to = 11> (v)
        }""")
    made = typed(model)
    assert types(made, "Mul") == types(made, "Add") * 2 == ["FLOAT16"] * 2
    casts = {(node.inputs[0].name, node.outputs[0].dtype.name) for node in nodes(made, "Cast")}
    assert casts >= {("i", "FLOAT16"), ("x", "FLOAT16"), ("d", "FLOAT16")} and ("h", "FLOAT") not in casts
    assert len(nodes(made, "Cast")) == 5 and not nodes(made, "CastLike")


def test_branches_are_typed_and_cast_what_they_read_themselves():
    model = parse("""
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (float[2,3] x, float[3,3] lam, bool c) => (float[2,3] y)
        <float[3,3] w = {1,2,3,4,5,6,7,8,9}> {
            h = MatMul (x, w)
            r = If (c) <
                then_branch = a () => (float[2,3] p) { q = MatMul (h, lam)  p = Softmax (q) },
                else_branch = b () => (float[2,3] s) { s = MatMul (x, w) }
            >
            y = MatMul (r, w)
        }""")
    made = typed(model)
    assert types(made, "MatMul") == ["FLOAT16"] * 4 and types(made, "If") == types(made, "Softmax") == ["FLOAT"]
    (choice,) = nodes(made, "If")
    then, other = (choice.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    # the adapter's tensor only where it is used; x once, around both
    assert [n.inputs[0].name for n in then if n.op_type == "Cast"] == ["lam", "q"]
    assert [n.inputs[0].name for n in other if n.op_type == "Cast"] == ["s/float16"]
    assert [n.inputs[0].name for n in made.model.graph if n.op_type == "Cast"] == ["x", "r", "y/float16"]
    feeds = {"x": numbers(1, 2, 3), "lam": numbers(2, 3, 3)}
    for chosen in (True, False):
        found = run(made.model, {**feeds, "c": np.array(chosen)})["y"]
        truth = evaluate(model, [{**feeds, "c": np.array(chosen)}])[0]["y"]
        # sums of three terms of rounded factors, twice over, of numbers up to 9
        assert np.abs(found - truth).max() <= 16 * 2.0**-11 * (np.abs(truth).max() + 27)
        assert not np.array_equal(found, truth)


def test_loops_keep_what_they_carry():
    model = parse("""
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (float[2,3] x, int64 n, bool c) => (float[2,3] y)
        <float[3,3] w = {0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9}> {
            h = MatMul (x, w)
            y = Loop (n, c, h) <body = a (int64 i, bool on, float[2,3] v) => (bool on_, float[2,3] v_) {
                on_ = Identity (on)  v_ = MatMul (v, w)
            }>
        }""")
    made = typed(model)
    assert types(made, "MatMul") == ["FLOAT16"] * 2
    feeds = {"x": numbers(1, 2, 3), "n": np.array(3), "c": np.array(True)}
    found, truth = run(made.model, feeds)["y"], evaluate(model, [feeds])[0]["y"]
    assert 0 < np.abs(found - truth).max() <= 4 * 3 * 2.0**-11 * np.abs(truth).max() * 4


def test_functions_are_written_out():
    model = parse("""
        <ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        agraph (float[2,3] x) => (float[2,3] y) { y = own.twice (x) }
        <domain: "own", opset_import: ["" : 20]>
        twice (a) => (b) { two = Constant <value_float = 2.0> ()  m = Mul (a, two)  b = Softmax (m) }
        """)
    made = typed(model)
    assert not made.model.functions and [n.op_type for n in made.model.graph.all_nodes() if n.domain == "own"] == []
    assert types(made, "Softmax") == types(made, "Mul") == ["FLOAT"], "on the way into a softmax"


def test_constants_generators_and_what_only_moves(builder):
    model = parse("""
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (float[2,3] x, int64[2] size, float[2,3] past) => (float[4,3] y, float[4,3] present, int64[2,1] best)
        <float[3,3] w = {1,2,3,4,5,6,7,8,9}> {
            h = MatMul (x, w)
            fill = ConstantOfShape <value = float[1] {0.5}> (size)
            blank = ConstantOfShape (size)
            half = Constant <value = float[1] {0.25}> ()
            g = Add (h, fill)
            k = Add (g, blank)
            m = Mul (k, half)
            t = Transpose <perm = [1, 0]> (m)
            u = Transpose <perm = [1, 0]> (t)
            present = Concat <axis = 0> (past, u)
            y = MatMul (present, w)
            best = ArgMax <axis = 1> (u)
        }""")
    made = typed(model)
    assert types(made, "ConstantOfShape") == types(made, "Transpose") == ["FLOAT16"] * 2
    assert types(made, "Mul") == types(made, "MatMul")[:1] == ["FLOAT16"] and not nodes(made, "Constant")
    # a cache that comes and goes as float32 is not rounded on the way
    assert types(made, "Concat") == ["FLOAT"] and made.kept["Concat"].reason == "moves float32 numbers"
    assert nodes(made, "ArgMax")[0].inputs[0].dtype == ir.DataType.FLOAT16
    feeds = {"x": numbers(1, 2, 3), "size": np.array([2, 3]), "past": numbers(2, 2, 3)}
    found = run(made.model, feeds)
    assert np.array_equal(found["present"][:2], feeds["past"])


def test_a_table_of_embeddings_is_stored_low(builder):
    b = builder()
    ids = b.input("ids", "batch", 3, dtype=ir.DataType.INT64)
    words, places = b.const("words", numbers(1, 9, 4)), b.const("places", numbers(2, 5, 4))
    h = b.op("Add", b.op("Gather", words, ids), b.op("Gather", places, ids))
    made = typed(b.model(b.op("LayerNormalization", h, b.const("gamma", np.ones(4)))))
    assert types(made, "Gather") == ["FLOAT16"] * 2
    assert {n: v.dtype.name for n, v in made.model.graph.initializers.items()} == {
        "words": "FLOAT16", "places": "FLOAT16", "gamma": "FLOAT"
    }  # fmt: skip


def test_quantised_layers_take_the_type_of_their_scale():
    model = parse("""
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (float[2,2] x) => (float[2,2] y)
        <int8[2,2] q = {-8, 3, 5, 7}, int32[2] c = {5, -7}, float s = {0.02}, float small = {0.000001}, int8 z = {3}> {
            xq = QuantizeLinear (x, s, z)
            xd = DequantizeLinear (xq, s, z)
            wd = DequantizeLinear (q, s, z)
            cd = DequantizeLinear (c, small)
            h = MatMul (xd, wd)
            y = Add (h, cd)
        }""")
    made = typed(model)
    by_name = {node.outputs[0].name.partition("/")[0]: node for node in made.model.graph}
    # x is quantised as it comes
    assert by_name["xq"].inputs[1].dtype == ir.DataType.FLOAT
    assert by_name["xd"].inputs[1] is by_name["wd"].inputs[1]
    assert types(made, "DequantizeLinear") == ["FLOAT16", "FLOAT16", "FLOAT"], "1e-6 has 4 bits in float16"
    assert types(made, "MatMul") == types(made, "Add") == ["FLOAT16"]
    assert typed(model, "bf16").low["DequantizeLinear"] == 3


def test_an_integer_accumulator_is_scaled_in_float32(builder):
    """Sums of products of bytes go beyond 65504."""
    model = parse("""
        <ir_version: 10, opset_import: ["" : 20]>
        agraph (float[2,300] x, uint8[300,2] w) => (float[2,2] y)
        <uint8 z = {0}, float s = {0.01}, float[2] c = {1, 2}> {
            q, qs, qz = DynamicQuantizeLinear (x)
            p = MatMulInteger (q, w, qz, z)
            f = Cast <to = 1> (p)
            k = Mul (qs, s)
            m = Mul (f, k)
            y = Add (m, c)
        }""")
    made = typed(model)
    scaled = {n.outputs[0].name: n.outputs[0].dtype.name for n in nodes(made, "Mul")}
    assert scaled["m"] == "FLOAT" and types(made, "Add") == ["FLOAT16"]
    weight = np.random.default_rng(0).integers(100, 255, (300, 2)).astype(np.uint8)
    feeds = {"x": np.abs(numbers(1, 2, 300)), "w": weight}
    found, truth = (run(each, feeds)["y"] for each in (made.model, model))
    assert np.abs(found - truth).max() <= 4 * 2.0**-11 * np.abs(truth).max()


def test_a_scatter_that_adds_is_a_sum(builder):
    b = builder()
    x, at = b.input("x", 4), b.input("at", 9, dtype=ir.DataType.INT64)
    h = b.op("Relu", x)
    more = b.const("more", np.ones(9))
    y = b.op("Add", b.op("ScatterElements", h, at, more, reduction="add"), b.op("ScatterElements", h, at, more))
    made = typed(b.model(y))
    assert types(made, "ScatterElements") == ["FLOAT", "FLOAT16"]


def test_attention_computes_its_softmax_in_float32(builder):
    b = builder()
    b.opsets = {"": 23}
    q, k, v = (b.op("Relu", b.input(name, 1, 2, 3, 4)) for name in "qkv")
    made = typed(b.model(b.op("Attention", q, k, v)))
    assert types(made, "Attention") == ["FLOAT16"]
    assert nodes(made, "Attention")[0].attributes["softmax_precision"].as_int() == int(ir.DataType.FLOAT)


def test_what_an_opset_has_no_bfloat16_for_stays(builder):
    """Convolutions have it from 22, to which a graph of 20 is raised, unless that changes what an operator means."""

    def convolution(opset, *, grouped=False):
        b = builder()
        b.opsets = {"": opset}
        h = b.op("Conv", b.input("x", 1, 4, 5, 5), b.const("w", numbers(1, 4, 4, 3, 3)))
        if grouped:
            two = b.const("two", np.ones(2))
            h = b.op("GroupNormalization", h, two, two, num_groups=2)
        return b.model(h)

    raised = typed(convolution(20), "bf16")
    assert (raised.model.graph.opset_imports[""], types(raised, "Conv")) == (22, ["BFLOAT16"])
    for model in (convolution(18), convolution(20, grouped=True)):
        version = model.graph.opset_imports[""]
        made = typed(model, "bf16", full=version == 18)
        assert made.model.graph.opset_imports[""] == version and types(made, "Conv") == ["FLOAT"]
        assert made.kept["Conv"].reason == f"no bfloat16 form is known of it in ai.onnx {version}"
        assert types(typed(model, full=version == 18), "Conv") == ["FLOAT16"]


def test_operators_of_other_domains_stay(layer):
    proto = ir.to_proto(layer)
    node = proto.graph.node.add(op_type="Odd", domain="own", input=["p"], output=["o"], name="odd")
    proto.opset_import.add(domain="own", version=1)
    proto.graph.output.add().CopyFrom(onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, None))
    made = typed(ir.from_proto(proto), full=False)
    assert node.op_type in made.kept and made.kept["Odd"].reason == "no float16 form is known of it in own 1"


def test_a_value_without_a_type_is_named(layer):
    proto = ir.to_proto(layer)
    proto.graph.node.add(op_type="Odd", domain="own", input=["p"], output=["o"], name="odd")
    proto.graph.node.add(op_type="Relu", input=["o"], output=["z"], name="after")
    proto.opset_import.add(domain="own", version=1)
    with pytest.raises(GraphError, match=r"node 'odd' \(Odd\): the type of its output 'o' is unknown; run"):
        type_graph(ir.from_proto(proto), "fp16")


def test_missing_types_are_inferred(layer):
    proto = ir.to_proto(layer)
    del proto.graph.value_info[:]
    made = typed(ir.from_proto(proto))
    assert made.rows() == type_graph(layer, "fp16").rows()


def test_an_unknown_precision_is_refused(layer):
    with pytest.raises(InputError, match="no precision 'int8' to type a graph to; use one of: fp16, bf16"):
        type_graph(layer, "int8")


def test_the_check_sees_a_wrong_type(layer):
    """A weight of another type than its layer's, a value of another than is computed, a type that an operator lacks."""
    made = type_graph(layer, "fp16").model
    weight = made.graph.initializers["w"]
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float32), name="w")
    weight.type = ir.TensorType(ir.DataType.FLOAT)
    with pytest.raises(GraphError, match=r"\(MatMul\) reads 'w' as float and 'x/float16' as float16; they must be"):
        check_typed(made)
    made = type_graph(layer, "fp16").model
    product = next(node for node in made.graph if node.op_type == "MatMul").outputs[0]
    product.type = ir.TensorType(ir.DataType.FLOAT)
    with pytest.raises(GraphError, match=r"\(MatMul\) makes 'v0' as float and"):
        check_typed(made)
    made = type_graph(layer, "fp16").model
    product = next(node for node in made.graph if node.op_type == "Cast").outputs[0]
    product.type = ir.TensorType(ir.DataType.INT8)
    with pytest.raises(GraphError, match="as int8, which its operator does not take"):
        check_typed(made)
    made = type_graph(layer, "fp16").model
    cast = next(node for node in made.graph if node.op_type == "Cast")
    cast.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    with pytest.raises(GraphError, match="contradicts itself"):
        check_typed(made)


def test_large_weights_are_rounded_when_they_are_written(builder, tmp_path, monkeypatch):
    b = builder()
    w = numbers(1, 64, 32)
    model = b.model(b.op("MatMul", b.input("x", 2, 64), b.const("w", w)))
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    model = load_graph(save_graph(model, tmp_path / "in"))
    monkeypatch.setattr(precision_numbers, "LARGE_BYTES", 4096)
    made = typed(model, full=False)
    assert isinstance(made.model.graph.initializers["w"].const_value, ir.LazyTensor)
    stored = load_graph(save_graph(made.model, tmp_path / "out")).graph.initializers["w"].const_value
    assert isinstance(stored, ir.ExternalTensor) and np.array_equal(stored.numpy(), w.astype(np.float16))


def test_it_needs_no_runtime_and_no_torch():
    code = (
        "import sys, deployfa.graph.precision\n"
        "print([name for name in ('torch', 'onnxruntime', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_result_is_frozen(layer):
    made = type_graph(layer, "fp16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.model = layer
