"""Placement ``norm``: exact when everything on the norm carries one T, and refused, with the reason, when not."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.errors import PlanError
from deployfa.graph import Plan, apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import NORM, OWN_WEIGHT, SIDE_OP

K = 4
FORMS = ["layer norm", "layer norm no shift", "mul add", "add mul", "mul", "gemma", "batch norm", "group norm"]
SHIFTLESS = {"mul", "gemma"}


class Normed:
    """A norm in one of its forms, and two sites that read it.  Square weights: no shape shows a wrong axis."""

    def __init__(self, builder, form, dtype=np.float32, *, also=None):
        rng = np.random.default_rng(5)
        g = builder(dtype)
        self.conv = form in {"batch norm", "group norm"}
        shape = ("batch", K, 3) if self.conv else ("batch", 3, K)
        x = g.input("x", *shape)
        self.x = rng.standard_normal((2, *shape[1:])).astype(dtype)
        gamma, beta = rng.standard_normal(K) + 2, rng.standard_normal(K)
        const = g.const
        if form.startswith("layer norm"):
            shift = [] if "no shift" in form else [const("beta", beta)]
            h = g.op("LayerNormalization", x, const("gamma", gamma), *shift, axis=-1)
        elif form in {"mul add", "add mul"}:
            z = g.op("Tanh", x)
            first = form == "mul add"
            scaled = g.op("Mul", *([z, const("gamma", gamma)] if first else [const("gamma", gamma), z]))
            h = g.op("Add", *([scaled, const("beta", beta)] if first else [const("beta", beta), scaled]))
        elif form == "mul":
            h = g.op("Mul", g.op("Tanh", x), const("gamma", gamma))
        elif form == "gemma":
            one = g.op("Add", const("w", gamma - 1), const("one", np.ones(())))
            h = g.op("Mul", g.op("Tanh", x), one)
        elif form == "batch norm":
            running = const("mean", rng.standard_normal(K)), const("var", rng.random(K) + 0.5)
            h = g.op("BatchNormalization", x, const("gamma", gamma), const("beta", beta), *running)
        else:
            h = g.op("InstanceNormalization", x, const("gamma", gamma), const("beta", beta))
        outputs = []
        for name in ("q", "k"):
            w = rng.standard_normal((K, K, 1) if self.conv else (K, K))
            out = f"y_{name}"
            weight = const(f"{name}.weight" if self.conv else f"{name}.weight.T", w)
            outputs.append(g.op("Conv" if self.conv else "MatMul", h, weight, site=name, out=out))
        if also == "residual":
            outputs.append(g.op("Neg", h, out="y_r"))
        elif also == "output":
            h.name = "y_h"
            outputs.append(h)
        elif also == "shared gamma":
            other = g.op("LayerNormalization", x, next(v for v in g.initializers if v.name == "gamma"), axis=-1)
            outputs.append(g.op("Identity", other, out="y_s"))
        self.model = g.model(*outputs)


def edit(*, shift=False, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: (rng.standard_normal(K) + 0.3).astype(np.float32)  # noqa: E731
    return Edit(lam=draw(), delta=draw() if shift else None)


def adapter(first, second=None):
    return Adapter("vefa", {"q": first, "k": second if second is not None else first})


def run(model, x):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return evaluate(model, [{"x": x}])[0]


def close(found, expected, dtype=np.float32):
    """γ', β' are rounded once; what follows is float64: a few roundings of the largest output, times the row sums."""
    unit = float(np.finfo(dtype).eps)
    return all(np.abs(found[n] - expected[n]).max() <= 8 * K * unit * np.abs(expected[n]).max() for n in expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_side_op(builder, form, shift, dtype):
    case, one = Normed(builder, form, dtype), edit(shift=shift)
    plan = make_plan(case.model, adapter(one), prefer="smallest-patch")
    expected = run(
        apply_adapter(case.model, adapter(one), make_plan(case.model, adapter(one), placement="side-op")), case.x
    )
    if shift and form in SHIFTLESS:
        assert {e.placement for e in plan.edits} == {OWN_WEIGHT}
        return
    assert [e.placement for e in plan.edits] == [NORM, NORM]
    assert "with 1 more on it" in plan.edits[0].reason
    rewritten = apply_adapter(case.model, adapter(one), plan)
    assert close(run(rewritten, case.x), expected, dtype)
    assert not close(run(case.model, case.x), expected, dtype), "the edit is far from the identity"
    extra = len(list(rewritten.graph)) - len(list(case.model.graph))
    assert extra == 0, "a fold adds no node"
    for name in ("q", "k"):
        key = f"{name}.weight" if case.conv else f"{name}.weight.T"
        before, after = (m.graph.initializers[key].const_value.numpy() for m in (case.model, rewritten))
        assert np.array_equal(before, after), "the weights stay as they are"


def test_the_patch_is_two_vectors_counted_once(builder):
    case, one = Normed(builder, "layer norm"), edit(shift=True)
    plan = make_plan(case.model, adapter(one), prefer="smallest-patch")
    assert [e.patch_bytes for e in plan.edits] == [2 * K * 4, 0]
    weights = make_plan(case.model, adapter(one), prefer="own-weight")
    assert {e.placement for e in weights.edits} == {OWN_WEIGHT}
    assert weights.patch_bytes > plan.patch_bytes


@pytest.mark.parametrize("part", ["lam", "delta"])
def test_two_edits_on_one_norm_do_not_fold(builder, part):
    case = Normed(builder, "layer norm")
    first, second = edit(shift=True), edit(shift=True)
    getattr(second, part)[1] += 1e-3
    plan = make_plan(case.model, adapter(first, second), prefer="smallest-patch")
    assert {e.placement for e in plan.edits} == {OWN_WEIGHT}


def test_an_unadapted_reader_blocks(builder):
    case = Normed(builder, "layer norm")
    one = Adapter("vefa", {"q": edit()})
    assert [e.placement for e in make_plan(case.model, one, prefer="smallest-patch").edits] == [OWN_WEIGHT]


@pytest.mark.parametrize("also", ["residual", "output"])
def test_a_residual_or_an_output_blocks(builder, also):
    case = Normed(builder, "layer norm", also=also)
    assert {e.placement for e in make_plan(case.model, adapter(edit()), prefer="smallest-patch").edits} == {OWN_WEIGHT}


def test_a_shared_scale_is_copied(builder):
    """Another norm reads the same γ (exporters merge norms at their start values): its output must not move."""
    case, one = Normed(builder, "layer norm", also="shared gamma"), edit()
    plan = make_plan(case.model, adapter(one), prefer="smallest-patch")
    assert {e.placement for e in plan.edits} == {NORM}
    before, after = run(case.model, case.x), run(apply_adapter(case.model, adapter(one), plan), case.x)
    assert np.array_equal(before["y_s"], after["y_s"])
    assert not np.array_equal(before["y_q"], after["y_q"])


def test_a_blocked_own_weight_goes_to_the_norm_by_itself(builder):
    """Without any preference: the weight is a graph input, the norm is free."""
    rng = np.random.default_rng(0)
    g = builder()
    x, w = g.input("x", "batch", K), g.input("w", K, K, default=rng.standard_normal((K, K)))
    h = g.op("LayerNormalization", x, g.const("gamma", rng.standard_normal(K)), axis=-1)
    model = g.model(g.op("MatMul", h, w, site="q", out="y"))
    one = Adapter("vefa", {"q": edit(shift=True)})
    (planned,) = make_plan(model, one).edits
    assert (planned.placement, planned.reason) == (NORM, "folds into its norm; weight is a graph input")
    feeds = {"x": rng.standard_normal((2, K)).astype(np.float32), "w": rng.standard_normal((K, K)).astype(np.float32)}
    beside = apply_adapter(model, one, make_plan(model, one, placement="side-op"))
    folded = apply_adapter(model, one, make_plan(model, one))
    assert close(evaluate(folded, [feeds])[0], evaluate(beside, [feeds])[0])


def test_a_plan_replays_from_its_json_and_where_it_is_not_exact_is_refused(builder, as_bytes):
    one = edit()
    case = Normed(builder, "layer norm")
    plan = make_plan(case.model, adapter(one), prefer="smallest-patch")
    assert {each.placement for each in plan.edits} == {"norm"}
    again = msgspec.json.decode(msgspec.json.encode(plan), type=Plan)
    replayed = apply_adapter(case.model, adapter(one), again)
    assert as_bytes(replayed) == as_bytes(apply_adapter(case.model, adapter(one), plan))
    assert as_bytes(replayed) != as_bytes(case.model)
    residual = Normed(builder, "layer norm", also="residual")
    with pytest.raises(PlanError, match=r"cannot fold into its norm.*also feeds Neg.*make a new plan"):
        apply_adapter(residual.model, adapter(one), again)
    other = adapter(one, edit(seed=9))
    with pytest.raises(PlanError, match="whose edit is another"):
        apply_adapter(Normed(builder, "layer norm").model, other, again)


@pytest.mark.parametrize("corrupt", ["scale as shift", "rows swapped", "shift not scaled"])
def test_corruptions_are_seen(builder, corrupt):
    case, one = Normed(builder, "layer norm"), edit(shift=True)
    plan = make_plan(case.model, adapter(one), prefer="smallest-patch")
    beside = apply_adapter(case.model, adapter(one), make_plan(case.model, adapter(one), placement="side-op"))
    expected = run(beside, case.x)
    bad = apply_adapter(case.model, adapter(one), plan)
    gamma, beta = (bad.graph.initializers[name] for name in ("gamma", "beta"))
    old = case.model.graph.initializers["beta"].const_value.numpy()
    g, b = np.array(gamma.const_value.numpy()), np.array(beta.const_value.numpy())
    if corrupt == "scale as shift":
        g, b = b, g
    elif corrupt == "rows swapped":
        g[[0, 1]] = g[[1, 0]]
    else:
        b = (old + one.delta).astype(np.float32)
    gamma.const_value, beta.const_value = ir.tensor(g, name="gamma"), ir.tensor(b, name="beta")
    assert not close(run(bad, case.x), expected)


def test_low_rank_and_side_op_stay_where_they_are(builder):
    from deployfa.edits import LowRank

    case = Normed(builder, "layer norm")
    rng = np.random.default_rng(1)
    low = Edit(input_low_rank=LowRank(rng.standard_normal((2, K)), rng.standard_normal((K, 2)), 1.0))
    assert {e.placement for e in make_plan(case.model, adapter(low), prefer="smallest-patch").edits} == {OWN_WEIGHT}
    beside = make_plan(case.model, adapter(edit()), placement="side-op", prefer="smallest-patch")
    assert {e.placement for e in beside.edits} == {SIDE_OP}


def test_a_view_between_norm_and_site_is_looked_through(builder):
    """GPT-2's Conv1D: the norm's output is reshaped to (batch * sequence, k) before a Gemm."""
    rng = np.random.default_rng(3)

    def build(last):
        g = builder()
        x = g.input("x", 2, 3, K)
        h = g.op("LayerNormalization", x, g.const("gamma", rng.standard_normal(K) + 2), axis=-1)
        flat = g.op("Reshape", h, g.const("to", np.array([6 * K // last, last])))
        w = g.const("q.weight", rng.standard_normal((last, last)))
        return g.model(g.op("Gemm", flat, w, site="q", out="y"))

    model, one = build(K), Adapter("vefa", {"q": edit(shift=True)})
    plan = make_plan(model, one, prefer="smallest-patch")
    assert [e.placement for e in plan.edits] == [NORM]
    x = rng.standard_normal((2, 3, K)).astype(np.float32)
    beside = apply_adapter(model, one, make_plan(model, one, placement="side-op"))
    assert close(run(apply_adapter(model, one, plan), x), run(beside, x))
    # a view that cuts the features in two is no view of them
    halves = Adapter("vefa", {"q": Edit(lam=np.ones(2, np.float32))})
    assert [e.placement for e in make_plan(build(2), halves, prefer="smallest-patch").edits] == [OWN_WEIGHT]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("form", ["batch norm", "layer norm"])
def test_a_norm_whose_own_parameters_are_one_tensor(builder, form, shift):
    """The exporter merges equal initializers: the start of a batch norm is two tensors, not four."""
    rng = np.random.default_rng(6)
    g = builder()
    shape = (K, 3) if form == "batch norm" else (3, K)
    x = g.input("x", "batch", *shape)
    if form == "batch norm":
        ones, zeros = g.const("ones", np.ones(K)), g.const("zeros", np.zeros(K))
        h = g.op("BatchNormalization", x, ones, zeros, zeros, ones)
        y = g.op("Conv", h, g.const("q.weight", rng.standard_normal((K, K, 1))), site="q", out="y")
    else:
        both = g.const("both", rng.standard_normal(K))
        h = g.op("LayerNormalization", x, both, both, axis=-1)
        y = g.op("MatMul", h, g.const("q.weight.T", rng.standard_normal((K, K))), site="q", out="y")
    model, one = g.model(y), Adapter("vefa", {"q": edit(shift=shift)})
    x = rng.standard_normal((2, *shape)).astype(np.float32)
    plan = make_plan(model, one)
    assert plan.count(NORM) == 1
    expected = run(apply_adapter(model, one, make_plan(model, one, placement="side-op")), x)
    assert close(run(apply_adapter(model, one, plan), x), expected)


def test_one_stored_vector_as_the_scale_of_unlike_norms(builder):
    """Gemma's norm adds 1 to it, the other does not: two new vectors."""
    rng = np.random.default_rng(7)
    g = builder()
    x, w, one = g.input("x", "batch", 3, K), g.const("w", rng.standard_normal(K)), g.const("one", np.ones(()))
    norms = g.op("Mul", g.op("Tanh", x), g.op("Add", w, one)), g.op("Mul", g.op("Sigmoid", x), w)
    weight = g.const("q.weight.T", rng.standard_normal((K, K)))
    model = g.model(*(g.op("MatMul", h, weight, site="q", out=f"y{at}") for at, h in enumerate(norms)))
    x, adapted = rng.standard_normal((2, 3, K)).astype(np.float32), Adapter("vefa", {"q": edit()})
    plan = make_plan(model, adapted)
    assert plan.count(NORM) == 1
    expected = run(apply_adapter(model, adapted, make_plan(model, adapted, placement="side-op")), x)
    assert close(run(apply_adapter(model, adapted, plan), x), expected)


def test_a_scale_that_is_an_output_of_the_graph_stays(builder):
    g = builder()
    scale = g.op("Add", g.const("w", np.arange(float(K))), g.const("one", np.ones(())), out="scale")
    h = g.op("Mul", g.op("Tanh", g.input("x", "batch", 3, K)), scale)
    model = g.model(g.op("MatMul", h, g.const("q.weight.T", np.eye(K)), site="q", out="y"), scale)
    adapted = Adapter("vefa", {"q": edit()})
    rewritten = apply_adapter(model, adapted, make_plan(model, adapted))
    x = np.ones((2, 3, K), np.float32)
    assert np.array_equal(run(rewritten, x)["scale"], run(model, x)["scale"])
