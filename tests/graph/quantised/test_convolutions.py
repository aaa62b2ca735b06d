"""A small CNN as ONNX Runtime quantises it: QLinearConv and QGemm, or Conv between QDQ, against numpy in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.errors import EditError, PlanError
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import SIDE_OP

KINDS = ("qoperator-tensor", "qoperator-channel", "qdq-tensor", "qdq-channel")
#: Parts that a site can have; a low rank has no form in front of a grouped convolution
PARTS = {"first": ("lam", "delta", "lorfa", "lora"), "depthwise": ("lam", "delta"), "head": ("lam", "delta", "lorfa")}


def adapter_of(truth, *sites, parts=None):
    sizes = {"first": (3, 8, (3, 3)), "depthwise": (8, 8, (3, 3)), "head": (8, 4, ())}
    return Adapter("vefa", {site: truth.edit(parts or PARTS[site], *sizes[site], seed=5) for site in sites})


def numbers(value):
    return value.const_value.numpy().astype(np.float64)


def dequantised(integers, scale, zero):
    """Scales of a convolution's weight, of a Gemm's with transB, and of a bias lie along the first axis."""
    shape = (-1,) + (1,) * (integers.const_value.numpy().ndim - 1)
    return (numbers(integers) - numbers(zero).reshape(shape)) * numbers(scale).reshape(shape)


def layer(model, site):
    """By the operators' definitions: name of x, W, c, the answer, how x is quantised, how the answer is.

    The answer is named by what reads it, because a rewrite may put something between; integers keep their name.
    """
    weights = model.graph.initializers[f"{site}.weight_quantized"]
    ((node, _),) = weights.uses()
    bias = model.graph.initializers[f"{site}.bias_quantized"]
    if node.op_type == "DequantizeLinear":
        w = dequantised(*node.inputs[:3])
        ((dequantizer, _),) = bias.uses()
        ((node, _),) = node.outputs[0].uses()
        after = next(iter(node.outputs[0].uses()))
        c = numbers(bias) * numbers(dequantizer.inputs[1])
        return node.inputs[0].name, w, c, (after.node.name, after.idx), None, None
    w = dequantised(*node.inputs[3:6])
    x_scale, x_zero = numbers(node.inputs[1]), numbers(node.inputs[2])
    c = numbers(bias) * x_scale * numbers(node.inputs[4]).reshape(-1)
    scale, zero = node.inputs[7:9] if node.op_type == "QGemm" else node.inputs[6:8]
    answer = numbers(scale), numbers(zero), np.iinfo(zero.const_value.numpy().dtype)
    return node.inputs[0].name, w, c, node.outputs[0].name, (x_scale, x_zero), answer


def check(base, adapted, adapter, truth, feeds):
    probe, known = adapted.clone(), {}
    for node in probe.graph:
        known |= {value.name: value for value in node.outputs}
    known |= {value.name: value for value in probe.graph.inputs}
    nodes = {node.name: node for node in probe.graph}
    layers = {site: layer(base, site) for site in adapter.edits}
    answers = {site: found[3] for site, found in layers.items()}
    reads = {s: a if isinstance(a, str) else nodes[a[0]].inputs[a[1]].name for s, a in answers.items()}
    names = {*(found[0] for found in layers.values()), *reads.values()} - {v.name for v in probe.graph.outputs}
    probe.graph.outputs.extend(known[name] for name in sorted(names))
    found = evaluate(probe, [feeds])[0]
    for site, (x_name, w, c, _, activation, answer) in layers.items():
        x, y, edit = found[x_name], found[reads[site]].astype(np.float64), adapter.edits[site]
        if activation is not None:
            x = (x.astype(np.float64) - activation[1]) * activation[0]
        how = {"groups": 8 if site == "depthwise" else 1, "pads": 1} if w.ndim > 2 else {}
        of = truth.conv if w.ndim > 2 else truth.dense
        wanted, size = of(edit, w, c, x, **how), of(edit, w, c, x, absolute=True, **how)
        if answer is not None:
            wanted, size = np.clip(np.rint(wanted / answer[0]) + answer[1], answer[2].min, answer[2].max), 0
        assert (np.abs(y - wanted) <= 1000 * 2.0**-53 * size).all(), f"{site} is not W T(x)"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_edit(kind, sources, quantised, truth, integers):
    source, base = sources("cnn"), quantised("cnn", kind)
    assert {"QLinearConv", "QGemm"} <= {n.op_type for n in base.model.graph} or kind.startswith("qdq")
    adapter = adapter_of(truth, "first", "depthwise", "head")
    for model in (base.wide, base.model):
        plan = make_plan(model, adapter)
        assert {edit.placement for edit in plan.edits} == {SIDE_OP}
        after = apply_adapter(model, adapter, plan)
        assert integers(model).items() <= integers(after).items()
        if model is base.wide:
            check(base.wide, after, adapter, truth, source.feeds)
            assert np.abs(source.answer(after) - base.answer).max() > 0
            with pytest.raises(AssertionError, match="head is not"):
                check(base.wide, after, adapter_of(truth, "head", parts=("lam",)), truth, source.feeds)
    spoilt = apply_adapter(base.wide, adapter, make_plan(base.wide, adapter))
    value = spoilt.graph.initializers["depthwise.weight_scale"]
    value.const_value = ir.tensor(value.const_value.numpy() * 1.05, name=value.name)
    with pytest.raises(AssertionError, match="depthwise is not"):
        check(base.wide, spoilt, adapter, truth, source.feeds)


@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_runs_it(kind, sources, quantised, truth):
    """Its error is that of one step at most: fused QDQ layers round elsewhere than the graph says."""
    import onnxruntime

    source, base = sources("cnn"), quantised("cnn", kind)
    adapter = adapter_of(truth, "first", "depthwise", "head")
    adapted = apply_adapter(base.model, adapter, make_plan(base.model, adapter))

    def run(model):
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return session.run(["logits"], source.feeds)[0]

    own = np.abs(run(base.model) - base.answer).max()
    step = float(base.model.graph.initializers["logits_scale"].const_value.numpy())
    assert np.abs(run(adapted) - source.answer(adapted)).max() <= max(own, step) * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_reasons(kind, quantised, truth):
    base = quantised("cnn", kind).model
    plan = {
        e.site: e.reason for e in make_plan(base, adapter_of(truth, "first", "depthwise", "head", parts=("lam",))).edits
    }
    if kind.startswith("qoperator"):
        assert all(reason.startswith("product is computed in integers") for reason in plan.values())
    else:
        assert plan["depthwise"].startswith(
            "weight of a grouped convolution is quantised; input is quantised on the way"
        )
        assert plan["head"].startswith("weight is quantised with one scale for 8 features, the factor differs")
    with pytest.raises(PlanError, match="and 2 more cannot fold"):
        make_plan(base, adapter_of(truth, "first", "depthwise", "head"), require_fold=True)
    with pytest.raises(EditError, match="'first'"):
        make_plan(base, Adapter("vefa", {"first": truth.edit(("lam",), 4, 8)}))
