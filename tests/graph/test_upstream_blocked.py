"""Ways upstream that look open and are not: the plan names what stands in the way, and what it builds stays exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import NORM, PRODUCER, SIDE_OP

B, S, K = 2, 6, 6
LAM = np.random.default_rng(3).uniform(-0.5, 0.5, K).astype(np.float32)


class Blocked:
    """``x → norm (or layer) → (something) → site q``, whose weight is a graph input, so that it cannot fold either."""

    def __init__(self, builder, between, *, start="norm"):
        self.rng = rng = np.random.default_rng(2)
        self.g = g = builder()
        # the first with Attention
        g.opsets = {"": 23, "com.microsoft": 1}
        x = g.input("x", B, S, K)
        self.feeds = {"x": rng.standard_normal((B, S, K)).astype(np.float32)}
        if start == "norm":
            h = g.op("LayerNormalization", x, self.draw("gamma", K), self.draw("beta", K), axis=-1)
        else:
            h = g.op("MatMul", x, self.draw("p.weight.T", K, K), site="p")
        h, *others = between(self, h)
        self.model = g.model(self.site("q", h, out="y"), *others)

    def draw(self, name, *shape):
        return self.g.const(name, self.rng.standard_normal(shape))

    def numbers(self, name, *numbers):
        return self.g.const(name, np.array(numbers))

    def feed(self, name, array):
        self.feeds[name] = array
        kind = ir.DataType.INT64 if array.dtype.kind == "i" else None
        return self.g.input(name, *array.shape, dtype=kind)

    def parts(self, h, axis, *sizes):
        node = ir.node("Split", [h, self.numbers("sizes", *sizes)], attributes={"axis": axis}, num_outputs=len(sizes))
        node.name = "split"
        for at, part in enumerate(node.outputs):
            part.name, part.type = f"part{at}", ir.TensorType(self.g.onnx)
        self.g.nodes.append(node)
        return node.outputs

    def site(self, name, h, out):
        self.feeds[f"{name}.weight"] = self.rng.standard_normal((K, 2)).astype(np.float32)
        return self.g.op("MatMul", h, self.g.input(f"{name}.weight", K, 2), site=name, out=out)

    def planned(self, *sites):
        """(the plan's edit, what its graph is off by, what the base is off by): relative to the side op."""
        adapter = Adapter("vefa", {name: Edit(lam=LAM) for name in ("q", *sites)})
        plan = make_plan(self.model, adapter)
        graphs = [
            apply_adapter(self.model, adapter, make_plan(self.model, adapter, placement="side-op")),
            apply_adapter(self.model, adapter, plan),
            self.model,
        ]
        expected, *found = (evaluate(graph, [self.feeds])[0] for graph in graphs)
        off = [
            max(np.linalg.norm(each[n] - expected[n]) / np.linalg.norm(expected["y"]) for n in expected)
            for each in found
        ]
        return plan.edits[0], *off


#: What was rounded once to float32, in sums of fewer than 100 terms.
ROUNDING = 2.0**-24 * 4


def tokens_split(case, h):
    first, rest = case.parts(h, 1, 1, S - 1)
    return first, case.g.op("Neg", rest, out="rest")


def tokens_split_output(case, h):
    first, rest = case.parts(h, 1, 1, S - 1)
    return first, rest


def average_over_features(case, h):
    return [case.g.op("AveragePool", h, kernel_shape=[3], pads=[1, 1], count_include_pad=1)]


def padded_with_what_is_fed(case, h):
    with_value = case.feed("value", np.array(2.5, np.float32))
    return [case.g.op("Pad", h, case.numbers("pads", 0, 1, 0, 0, 0, 0), with_value)]


def sliced_along_what_is_fed(case, h):
    axis = case.feed("axis", np.array([1]))
    first, last = (
        case.g.op("Slice", h, case.numbers(f"start{at}", at), case.numbers(f"end{at}", at + 3), axis) for at in (0, 3)
    )
    return first, case.g.op("Neg", last, out="last")


def attention_that_mixes_the_features(case, h):
    """h is (batch, features, tokens) here: what attention takes for tokens are the features of q."""
    turned = case.g.op("Transpose", h, perm=[0, 2, 1])
    values = case.g.op("MatMul", h, case.draw("v.weight.T", K, K), site="v")
    node = ir.node("Attention", [turned, turned, case.g.op("Transpose", values, perm=[0, 2, 1])], attributes=HEADS)
    node.outputs[0].name, node.outputs[0].type = "attention", ir.TensorType(case.g.onnx)
    case.g.nodes.append(node)
    return [case.g.op("Transpose", node.outputs[0], perm=[0, 2, 1])]


def attention_with_earlier_values(case, h):
    query = case.g.op("Tanh", case.g.inputs[0])
    earlier = [
        case.feed(name, case.rng.standard_normal((B, 2, 4, K // 2)).astype(np.float32)) for name in ("keys", "values")
    ]
    node = ir.node("Attention", [query, query, h, None, *earlier], attributes=HEADS, num_outputs=3)
    for at, each in enumerate(node.outputs):
        each.name, each.type = f"attention{at}", ir.TensorType(case.g.onnx)
    case.g.nodes.append(node)
    return [node.outputs[0]]


HEADS = {"q_num_heads": 2, "kv_num_heads": 2}


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (attention_that_mixes_the_features, "1+λ varies over the tokens that attention sums over"),
        (attention_with_earlier_values, "an attention that also reads values of earlier tokens"),
        (tokens_split, "norm also feeds another part of Split 'split'"),
        (tokens_split_output, "norm also feeds another part of Split 'split'"),
        (average_over_features, "comes from AveragePool over its features"),
        (padded_with_what_is_fed, "input is padded"),
        (sliced_along_what_is_fed, "a slice with computed bounds"),
    ],
)
def test_what_blocks_is_named_and_stays_exact(builder, between, reason):
    edit, off, base = Blocked(builder, between).planned()
    assert edit.placement == SIDE_OP and reason in edit.reason
    assert off <= ROUNDING < base


def test_max_pooling_over_features_blocks(builder):
    """Planned only: onnx's evaluator cannot pool with padding."""
    case = Blocked(builder, lambda case, h: [case.g.op("MaxPool", h, kernel_shape=[3], pads=[1, 1])])
    plan = make_plan(case.model, Adapter("vefa", {"q": Edit(lam=LAM)}))
    assert "comes from MaxPool over its features" in plan.edits[0].reason


def test_an_attention_that_answers_its_values_blocks(builder):
    """Planned only: the evaluator has no operators of that domain."""

    def attention(case, h):
        query = case.g.op("Tanh", case.g.inputs[0])
        inputs, heads = [query, query, h], {"num_heads": 2}
        node = ir.node("MultiHeadAttention", inputs, attributes=heads, domain="com.microsoft", num_outputs=3)
        for each, shape in zip(node.outputs, [(B, S, K), *[(B, 2, S, K // 2)] * 2], strict=True):
            each.name, each.type, each.shape = f"a{len(shape)}", ir.TensorType(case.g.onnx), ir.Shape(shape)
        node.outputs[2].name = "values"
        case.g.nodes.append(node)
        return node.outputs[0], node.outputs[2]

    plan = make_plan(Blocked(builder, attention).model, Adapter("vefa", {"q": Edit(lam=LAM)}))
    assert "an attention that also answers its keys and values" in plan.edits[0].reason


def test_parts_that_nothing_reads_or_that_stay_do_not_block(builder):
    edit, off, base = Blocked(builder, lambda case, h: [case.parts(h, 1, 1, S - 1)[0]]).planned()
    assert edit.placement == NORM and off <= ROUNDING < base

    def widened(case, h):
        wide = case.g.op("MatMul", h, case.draw("v.weight.T", K, 2 * K), site="v")
        ours, other = case.parts(wide, -1, K, K)
        return ours, case.g.op("Neg", other, out="other")

    edit, off, base = Blocked(builder, widened, start="layer").planned()
    assert edit.placement == PRODUCER and off <= ROUNDING < base


def turned(case, x):
    """The weight of one layer and its transpose as that of another, both with one edit after them."""
    w = case.draw("shared.weight", K, K)
    first = case.g.op("MatMul", x, w, site="first")
    second = case.g.op("MatMul", case.g.op("Tanh", x), case.g.op("Transpose", w, perm=[1, 0]), site="second")
    return first, case.site("k", second, out="y_k")


def both_ways(case, x):
    w = case.draw("shared.weight", K, K)
    rows = case.g.op("Reshape", x, case.numbers("flat", B * S, K))
    first = case.g.op("MatMul", x, w, site="first")
    second = case.g.op("Gemm", rows, w, site="second", transB=1)
    return first, case.site("k", second, out="y_k")


@pytest.mark.parametrize("between", [turned, both_ways])
def test_a_square_weight_that_is_read_in_two_ways_takes_no_fold(builder, between):
    edit, off, base = Blocked(builder, between).planned("k")
    assert edit.placement == SIDE_OP and "layer before shares its weight" in edit.reason
    assert off <= ROUNDING < base


def test_a_bias_that_is_wider_than_its_layer_takes_no_fold(builder):
    def between(case, h):
        one = case.g.op("MatMul", h, case.draw("v.weight.T", K, 1), site="v")
        return [case.g.op("Add", one, case.draw("v.bias", K), site="v")]

    edit, off, base = Blocked(builder, between).planned()
    assert edit.placement == SIDE_OP and "wider than its output" in edit.reason
    assert off <= ROUNDING < base


def test_a_graph_that_contradicts_itself_takes_no_fold(builder):
    """Planned only: such a graph cannot run, but a plan says so in a line."""

    def between(case, h):
        one = case.g.op("Slice", h, *(case.numbers(name, at) for name, at in (("start", 0), ("end", 1), ("axis", 2))))
        return [case.g.op("Reshape", one, case.numbers("shape", 0, S, 1))]

    plan = make_plan(Blocked(builder, between).model, Adapter("vefa", {"q": Edit(lam=LAM)}))
    assert "the shape of the input does not fit the weight" in plan.edits[0].reason
