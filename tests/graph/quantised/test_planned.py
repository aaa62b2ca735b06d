"""Where the plan puts edits on real quantised graphs, and the reasons that it gives for what it refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.errors import PlanError
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.plan import NORM, OWN_WEIGHT, PRODUCER, SIDE_OP

FLOATING_INPUT = ("dynamic-tensor", "dynamic-channel", "int4-symmetric", "int4-asymmetric", "int4-qdq-symmetric")
#: kind → why λ stays out of the layer's own scales
OWN = {
    "dynamic": "weight is quantised with one scale for all inputs",
    "int4": "weight is quantised with one scale for 32 features, the factor differs among them",
    "qdq": "weight is quantised with one scale for 48 features, the factor differs among them",
    "qoperator": "product is computed in integers, with one scale for all inputs",
}
INTO_SCALES = "folds into its own weight; into its scales, the integers stay"
ON_THE_WAY = "input is quantised on the way, which a scale does not pass exactly"


def planned(model, adapter, **options):
    return {edit.site: edit for edit in make_plan(model, adapter, **options).edits}


def own(kind):
    return OWN[kind.partition("-")[0]]


def changed(before, after):
    """Names of the initializers whose numbers differ, and of those that are new."""
    ours, theirs = before.graph.initializers, after.graph.initializers
    same = {
        name
        for name in ours
        if name in theirs and ours[name].const_value.tobytes() == theirs[name].const_value.tobytes()
    }
    return set(ours) - same, set(theirs) - set(ours)


@pytest.mark.parametrize("kind", FLOATING_INPUT)
def test_one_t_on_what_reads_a_norm_goes_into_the_norm(kind, sources, quantised):
    """GPT-2 is pre-norm: its fused q, k, v alone read the norm, and so does the first feed-forward layer."""
    source, base = sources("gpt2"), quantised("gpt2", kind).model
    adapter = source.adapter("vefa+delta")
    plan = planned(base, adapter)
    for site in ("attn.c_attn", "mlp.c_fc"):
        edit = plan[f"transformer.h.0.{site}"]
        assert (edit.placement, edit.reason) == (NORM, f"folds into its norm; {own(kind)}")
        # γ and β
        assert edit.patch_bytes == 2 * 48 * 4
    norms = {site: edit for site, edit in adapter.edits.items() if site.endswith(("c_attn", "c_fc"))}
    only = Adapter("vefa", norms)
    touched, new = changed(base, apply_adapter(base, only, make_plan(base, only)))
    assert touched == {
        f"transformer.h.{at}.ln_{n}.{part}" for at in (0, 1) for n in (1, 2) for part in ("weight", "bias")
    }
    assert not new


@pytest.mark.parametrize("kind", FLOATING_INPUT)
def test_what_gpt2_refuses_and_why(kind, sources, quantised):
    base = quantised("gpt2", kind).model
    plan = planned(base, sources("gpt2").adapter("vefa"))
    # only the scales of V's rows in the fused layer change
    assert (plan["transformer.h.1.attn.c_proj"].placement, plan["transformer.h.1.attn.c_proj"].reason) == (
        PRODUCER,
        f"folds into the scales of the rows of the layer before through attention; {own(kind)}",
    )
    assert plan["transformer.h.1.mlp.c_proj"].reason.startswith(
        f"{own(kind).replace('48', '192')}; producer also feeds Pow"
    )
    for name in ("lorfa", "lora"):
        for edit in planned(base, sources("gpt2").adapter(name)).values():
            assert edit.placement == SIDE_OP
            assert edit.reason.startswith("weight is quantised, low rank would requantise it")


@pytest.mark.parametrize("kind", ["qdq-tensor", "qdq-channel", "qoperator-tensor", "qoperator-channel"])
def test_nothing_passes_a_quantised_activation(kind, sources, quantised):
    """T applies after the activation is dequantised; what is before it would round other numbers."""
    base = quantised("gpt2", kind).model
    for name in ("vefa", "vefa+delta"):
        for site, edit in planned(base, sources("gpt2").adapter(name)).items():
            features = "192" if site.endswith("mlp.c_proj") else "48"
            assert (edit.placement, edit.reason) == (SIDE_OP, f"{own(kind).replace('48', features)}; {ON_THE_WAY}")
    low = "weight is quantised, low rank" if kind.startswith("qdq") else OWN["qoperator"]
    for edit in planned(base, sources("gpt2").adapter("lorfa")).values():
        assert edit.placement == SIDE_OP and edit.reason.startswith(low)
    with pytest.raises(PlanError, match=r"site 'transformer.h.0.attn.c_attn' and 7 more cannot fold: .*drop --require"):
        make_plan(base, sources("gpt2").adapter("vefa"), require_fold=True)


@pytest.mark.parametrize("kind", FLOATING_INPUT)
def test_the_output_projection_goes_into_the_scales_of_the_values(kind, sources, quantised, integers):
    """MiniLM's λ of attention.output.dense passes the weighted sum; q, k, v share a norm with the residual."""
    source, base = sources("minilm"), quantised("minilm", kind).model
    adapter = source.adapter("shared")
    plan = planned(base, adapter)
    value = "bert.encoder.layer.2.attention.self.value"
    edit = plan["bert.encoder.layer.2.attention.output.dense"]
    assert edit.placement == PRODUCER
    assert edit.reason == f"folds into the scales of the rows of the layer before through attention; {own(kind)}"
    assert edit.into.startswith(f"{value}.weight")
    query = plan["bert.encoder.layer.2.attention.self.query"]
    assert query.placement == SIDE_OP
    assert query.reason.startswith(f"{own(kind)}; norm also feeds Add")
    assert plan[value].reason.endswith("shares the side op of 'bert.encoder.layer.2.attention.self.query'")
    assert plan["bert.encoder.layer.2.output.dense"].reason.endswith(
        "input comes from Gelu, which a scale does not pass"
    )

    only = Adapter(
        "vefa", {site: edit for site, edit in adapter.edits.items() if site.endswith("attention.output.dense")}
    )
    after = apply_adapter(base, only, make_plan(base, only))
    touched, new = changed(base, after)
    bias = {f"bert.encoder.layer.{at}.attention.self.value.bias" for at in range(6)}
    # the scales and the bias of each value layer, nothing else
    assert bias <= touched and len(touched) == 12 and not new
    assert all("scale" in name for name in touched - bias)
    assert touched.isdisjoint(integers(base))
    lam = only.edits["bert.encoder.layer.2.attention.output.dense"].lam.astype(np.float64)
    for name in touched:
        if name.startswith(f"{value}."):
            old, found = (
                model.graph.initializers[name].const_value.numpy().astype(np.float64) for model in (base, after)
            )
            # (d,), or (d, blocks) for MatMulNBits, or (blocks, d) for a DequantizeLinear, or one for the whole tensor
            factor = 1 + lam if old.ndim < 2 or old.shape[-1] == 384 else (1 + lam)[:, None]
            if old.ndim == 1 and old.size > 384:
                factor = np.repeat(1 + lam, old.size // 384)
            assert np.array_equal(found, (old * factor).astype(np.float32))


@pytest.mark.parametrize("kind", ["int4-symmetric", "int4-asymmetric", "int4-qdq-symmetric", "int4-qdq-asymmetric"])
def test_a_factor_that_repeats_in_a_block_goes_into_the_own_scales(kind, sources, quantised, integers):
    """And one number that differs, even in the short last block, keeps it out."""
    source, base = sources("gpt2"), quantised("gpt2", kind)
    site = "transformer.h.1.attn.c_proj"
    lam = np.repeat(np.float32([0.25, -0.5]), 32)[:48]
    adapter = Adapter("vefa", {site: Edit(lam=lam)})
    plan = make_plan(base.model, adapter)
    (edit,) = plan.edits
    assert (edit.placement, edit.reason) == (OWN_WEIGHT, INTO_SCALES)
    after = apply_adapter(base.model, adapter, plan)
    touched, new = changed(base.model, after)
    assert len(touched) == 1 and "scale" in min(touched) and not new
    assert integers(after) == integers(base.model)
    beside = apply_adapter(base.wide, adapter, make_plan(base.wide, adapter, placement="side-op"))
    found = source.answer(apply_adapter(base.wide, adapter, plan))
    assert np.linalg.norm(found - source.answer(beside)) <= 1e-12 * np.linalg.norm(found)
    for at in (5, 47):
        one = lam.copy()
        one[at] += np.float32(2**-20)
        (edit,) = make_plan(base.model, Adapter("vefa", {site: Edit(lam=one)})).edits
        assert edit.placement == PRODUCER and OWN["int4"] in edit.reason


def test_scales_along_the_inputs_take_any_factor(sources, quantised, layer_of, integers):
    """A DequantizeLinear with one scale for each input, as some vendors write; its twin has one for each output."""
    source, base = sources("gpt2"), quantised("gpt2", "int4-qdq-symmetric")
    site = "transformer.h.0.mlp.c_proj"
    model = base.wide.clone()
    weight = layer_of(model.graph, site).w.T
    node = next(node for node in model.graph if node.op_type == "DequantizeLinear" and site in node.inputs[0].name)
    scale = np.abs(weight).max(axis=1) / 127
    for index, array in enumerate((np.rint(weight / scale[:, None]).astype(np.int8), scale)):
        value = node.inputs[index]
        value.const_value = ir.tensor(array, name=value.name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    del node.attributes["block_size"]
    node.attributes["axis"] = ir.AttrInt64("axis", 0)
    assert np.abs(layer_of(model.graph, site).w.T - weight).max() <= scale.max() / 2 + 1e-12

    adapter = Adapter("vefa", {site: source.adapter("vefa").edits[site]})
    plan = make_plan(model, adapter)
    assert [(edit.placement, edit.reason) for edit in plan.edits] == [(OWN_WEIGHT, INTO_SCALES)]
    after = apply_adapter(model, adapter, plan)
    assert integers(after) == integers(model)
    beside = source.answer(apply_adapter(model, adapter, make_plan(model, adapter, placement="side-op")))
    assert np.linalg.norm(source.answer(after) - beside) <= 1e-12 * np.linalg.norm(beside)
    # one scale for each output instead
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    scales = node.inputs[1]
    scales.const_value, scales.shape = ir.tensor(np.ones(48), name=scales.name), ir.Shape([48])
    (edit,) = make_plan(model, adapter).edits
    assert edit.placement == SIDE_OP and "one scale for 192 features" in edit.reason


#: kind → where a factor on every output of a layer, its bias included, goes
OUTPUT_SCALES = {
    "dynamic-tensor": (OWN_WEIGHT, INTO_SCALES),
    "dynamic-channel": (OWN_WEIGHT, INTO_SCALES),
    "int4-symmetric": (OWN_WEIGHT, INTO_SCALES),
    "int4-qdq-asymmetric": (OWN_WEIGHT, INTO_SCALES),
    "qdq-tensor": (SIDE_OP, "weight is quantised with one scale for 144 features, the factor differs among them"),
    "qdq-channel": (SIDE_OP, "bias is quantised"),
    "qoperator-tensor": (SIDE_OP, OWN["qoperator"]),
}


@pytest.mark.parametrize("kind", OUTPUT_SCALES)
def test_an_output_scale_goes_into_the_scales_of_the_rows(kind, sources, quantised, integers):
    """IA3 of the output kind: exact where W has a scale for each output, or one that can become many."""
    source, base = sources("gpt2"), quantised("gpt2", kind)
    rng = np.random.default_rng(0)
    drawn = {site: (0.2 * rng.standard_normal(d)).astype(np.float32) for site, (_, d) in source.sites.items()}
    adapter = Adapter("ia3", {site: Edit(output_scale=scale) for site, scale in drawn.items()})
    plan = make_plan(base.model, adapter)
    first = plan.edits[0]
    assert (first.placement, first.reason) == OUTPUT_SCALES[kind]
    assert integers(base.model).items() <= integers(apply_adapter(base.model, adapter, plan)).items()
    beside = source.answer(apply_adapter(base.wide, adapter, make_plan(base.wide, adapter, placement="side-op")))
    found = source.answer(apply_adapter(base.wide, adapter, plan))
    assert np.linalg.norm(found - beside) <= 1e-12 * np.linalg.norm(beside)
    assert np.linalg.norm(beside - base.answer) > 1e-2 * np.linalg.norm(beside)
