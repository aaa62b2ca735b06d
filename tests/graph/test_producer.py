"""λ in the rows of the layer before: through heads, attention, gates and ReLU, quantised or not; and what blocks it."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit, LowRank
from deployfa.errors import PlanError
from deployfa.graph import Plan, apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import PRODUCER, SIDE_OP

B, S, K = 2, 3, 8
HEADS, GROUPS = 4, 2
RNG = np.random.default_rng(8)
X = RNG.standard_normal((B, S, K)).astype(np.float32)


def lam(k=K, low=-0.5, high=0.5, repeats=1):
    drawn = np.random.default_rng(3).uniform(low, high, k // repeats)
    return np.repeat(drawn, repeats).astype(np.float32)


class Model:
    """``x → value layer → (something) → out layer``; the out layer's weight is a graph input, so it cannot fold."""

    def __init__(self, builder, between, *, width=K, quantised=False, bias=True):
        rng = np.random.default_rng(1)
        self.g = g = builder()
        x = g.input("x", B, S, K)
        self.w, self.c = rng.standard_normal((K, width)), rng.standard_normal(width)
        if quantised:
            self.q = rng.integers(-100, 100, (K, width)).astype(np.int8)
            scales = g.const("v.scale", rng.uniform(0.01, 0.02, width))
            weight = g.op("DequantizeLinear", self._int8("v.q"), scales, axis=1)
        else:
            weight = g.const("v.weight.T", self.w)
        product = g.op("MatMul", x, weight, site="v")
        value = g.op("Add", product, g.const("v.bias", self.c), site="v") if bias else product
        h = between(g, x, value)
        k = 2 * K if between is two_streams else K
        o = g.input("o.weight.T", k, 3, default=rng.standard_normal((k, 3)))
        self.model = g.model(g.op("MatMul", h, o, site="o", out="y"))

    def _int8(self, name):
        tensor = ir.tensor(self.q, name=name)
        value = ir.Value(name=name, shape=ir.Shape(self.q.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.g.initializers.append(value)
        return value


def direct(g, x, value):
    return value


def relu(g, x, value):
    return g.op("Relu", value)


def gelu(g, x, value):
    return g.op("Gelu", value)


def residual(g, x, value):
    return g.op("Add", g.op("Relu", value), value)


def gated(g, x, value):
    gate = g.op("MatMul", x, g.const("gate.weight.T", RNG.standard_normal((K, K))), site="gate")
    return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), value)


def two_streams(g, x, value):
    return g.op("Concat", value, value, axis=-1)


def split_heads(g, value, heads):
    shaped = g.op("Reshape", value, g.const(f"to{heads}", np.array([0, 0, heads, -1])))
    return g.op("Transpose", shaped, perm=[0, 2, 1, 3])


def probabilities(g, x):
    scores = g.op("MatMul", split_heads(g, x, HEADS), g.op("Transpose", split_heads(g, x, HEADS), perm=[0, 1, 3, 2]))
    return g.op("Softmax", scores, axis=-1)


def merge_heads(g, weighted):
    back = g.op("Transpose", weighted, perm=[0, 2, 1, 3])
    return g.op("Reshape", back, g.const("merge", np.array([0, 0, K])))


def attention(g, x, value):
    return merge_heads(g, g.op("MatMul", probabilities(g, x), split_heads(g, value, HEADS)))


def grouped(g, x, value):
    """Two key-value heads for four query heads, repeated as ``repeat_kv`` does."""
    each = HEADS // GROUPS
    v = g.op("Unsqueeze", split_heads(g, value, GROUPS), g.const("at", np.array([2])))
    v = g.op("Expand", v, g.const("each", np.array([1, 1, each, 1, 1])))
    v = g.op("Reshape", v, g.const("all", np.array([0, HEADS, S, K // HEADS])))
    return merge_heads(g, g.op("MatMul", probabilities(g, x), v))


def last_third(g, x, value):
    """A fused QKV layer: only V's rows may change, Q and K are used as they are."""
    q, k, v = (
        g.op(
            "Slice",
            value,
            *(g.const(f"{name}{i}", np.array([n])) for name, n in zip("sea", (i * K, i * K + K, 2), strict=True)),
        )
        for i in range(3)
    )
    return g.op("Mul", g.op("Sigmoid", g.op("Add", q, k)), v)


def planned(model, edits, **options):
    adapter = Adapter("vefa", edits)
    plan = make_plan(model, adapter, **options)
    return adapter, plan, {edit.site: edit for edit in plan.edits}


def run(model, x=X):
    return evaluate(model, [{"x": x, "o.weight.T": model.graph.initializers["o.weight.T"].const_value.numpy()}])[0]["y"]


def close(found, expected):
    """Each number of the producer is rounded once to float32: at most half a unit, of sums of fewer than 100 terms."""
    return np.linalg.norm(found - expected) <= 2.0**-24 * 4 * np.linalg.norm(expected)


def beside(model, adapter):
    return run(apply_adapter(model, adapter, make_plan(model, adapter, placement="side-op")))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", [direct, relu, gated, attention])
@pytest.mark.parametrize("quantised", [False, True])
def test_folds_into_the_rows_of_the_layer_before(builder, between, bias, quantised):
    case = Model(builder, between, quantised=quantised, bias=bias)
    adapter, plan, edits = planned(case.model, {"o": Edit(lam=lam())})
    assert edits["o"].placement == PRODUCER and "weight is a graph input" in edits["o"].reason
    assert edits["o"].into == ("v.q" if quantised else "v.weight.T") and edits["o"].extra_flops_per_token == 0
    folded = apply_adapter(case.model, adapter, plan)
    assert len(folded.graph) == len(case.model.graph), "not one node more"
    assert close(run(folded), beside(case.model, adapter))
    assert not close(run(folded), run(case.model)), "the adapter does something"
    if quantised:
        assert folded.graph.initializers["v.q"].const_value.numpy().tobytes() == case.q.tobytes()
        assert edits["o"].patch_bytes == 4 * K + 4 * K * bias, "scales and bias, not the weight"


def test_a_plan_replays_from_its_json(builder, as_bytes):
    case = Model(builder, attention)
    adapter, plan, _ = planned(case.model, {"o": Edit(lam=lam()), "v": Edit(lam=lam())})
    again = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    assert as_bytes(apply_adapter(case.model, adapter, again)) == as_bytes(apply_adapter(case.model, adapter, plan))
    other = Model(builder, residual)
    with pytest.raises(PlanError, match=r"'o' cannot fold into its producer as the plan says: .*; make a new plan"):
        apply_adapter(other.model, adapter, again)


def test_the_layer_before_is_a_site_too(builder):
    """Its own VeFA, LoRFA and LoRA fold first; λ of the next layer then scales all of it."""
    rng = np.random.default_rng(4)
    low = LowRank(rng.standard_normal((2, K)), rng.standard_normal((K, 2)), 0.5)
    case = Model(builder, attention)
    own = Edit(lam=lam(), input_low_rank=low, output_low_rank=low, delta=rng.standard_normal(K))
    adapter, plan, edits = planned(case.model, {"v": own, "o": Edit(lam=lam())})
    assert edits["o"].placement == PRODUCER
    assert close(run(apply_adapter(case.model, adapter, plan)), beside(case.model, adapter))


@pytest.mark.parametrize("repeats", [1, K // HEADS])
def test_grouped_queries_need_a_repeating_scale(builder, repeats):
    """λ of the output layer is by query head; a key-value head serves two of them."""
    case = Model(builder, grouped, width=K // (HEADS // GROUPS))
    per_head = lam().reshape(GROUPS, HEADS // GROUPS, -1)
    repeated = np.repeat(per_head[:, :1], HEADS // GROUPS, axis=1).reshape(-1)
    adapter, plan, edits = planned(case.model, {"o": Edit(lam=repeated if repeats > 1 else lam())})
    assert edits["o"].placement == (PRODUCER if repeats > 1 else SIDE_OP)
    if repeats == 1:
        assert "features that share one source (a key-value group)" in edits["o"].reason
    assert close(run(apply_adapter(case.model, adapter, plan)), beside(case.model, adapter))


def test_only_the_values_of_a_fused_layer_change(builder):
    case = Model(builder, last_third, width=3 * K)
    adapter, plan, edits = planned(case.model, {"o": Edit(lam=lam())})
    assert edits["o"].placement == PRODUCER
    folded = apply_adapter(case.model, adapter, plan)
    before, after = (m.graph.initializers["v.weight.T"].const_value.numpy() for m in (case.model, folded))
    assert np.array_equal(before[:, : 2 * K], after[:, : 2 * K]) and not np.array_equal(before, after)
    assert close(run(folded), beside(case.model, adapter))


@pytest.mark.parametrize(
    ("between", "edit", "reason"),
    [
        (gelu, Edit(lam=lam()), "comes from Gelu, which a scale does not pass"),
        (residual, Edit(lam=lam()), "is a sum"),
        (relu, Edit(lam=lam(low=-1.5)), "only a positive scale passes, but some 1.λ ≤ 0"),
        (attention, Edit(lam=lam(), delta=lam()), "δ does not pass a weighted sum"),
        (direct, Edit(delta=lam()), "δ would need a bias of the layer before"),
        (two_streams, Edit(lam=lam(2 * K)), "comes from Concat"),
    ],
)
def test_what_blocks_is_named_and_stays_exact(builder, between, edit, reason):
    case = Model(builder, between)
    adapter, plan, edits = planned(case.model, {"o": edit})
    assert edits["o"].placement == SIDE_OP
    assert reason.replace("1.λ", "1+λ") in edits["o"].reason
    assert close(run(apply_adapter(case.model, adapter, plan)), beside(case.model, adapter))


def test_another_reader_blocks(builder):
    case = Model(builder, direct)
    graph = case.model.graph
    value = next(node for node in graph if node.op_type == "Add").outputs[0]
    graph.append(ir.node("Neg", [value], name="reader"))
    _, _, edits = planned(case.model, {"o": Edit(lam=lam())})
    assert edits["o"].placement == SIDE_OP and "producer also feeds Neg 'reader'" in edits["o"].reason
    graph.remove(graph[-1], safe=True)
    graph.outputs.append(value)
    _, _, edits = planned(case.model, {"o": Edit(lam=lam())})
    assert edits["o"].placement == SIDE_OP and "producer is also an output of the graph" in edits["o"].reason


@pytest.mark.parametrize("corrupt", ["columns", "bias not scaled", "bias scaled twice", "rows swapped"])
def test_corruptions_are_seen(builder, corrupt):
    case = Model(builder, attention)
    adapter, plan, _ = planned(case.model, {"o": Edit(lam=lam())})
    bad = apply_adapter(case.model, adapter, plan)
    expected, factor = beside(case.model, adapter), 1 + lam()
    weight, bias = (bad.graph.initializers[name] for name in ("v.weight.T", "v.bias"))
    w, c = np.array(weight.const_value.numpy()), np.array(bias.const_value.numpy())
    if corrupt == "columns":
        w = case.w.astype(np.float32) * factor[:, None]
    elif corrupt == "bias not scaled":
        c = case.c.astype(np.float32)
    elif corrupt == "bias scaled twice":
        c = c * factor
    else:
        w[:, [0, 1]] = w[:, [1, 0]]
    weight.const_value, bias.const_value = ir.tensor(w, name="v.weight.T"), ir.tensor(c, name="v.bias")
    assert not close(run(bad), expected)
