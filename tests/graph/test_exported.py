"""What PyTorch's exporter really writes, with every site adapted at once, against the PyTorch model in float64."""

from __future__ import annotations

import copy

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from deployfa.adapter import Adapter
from deployfa.errors import LeftoverError, PlanError, SiteError
from deployfa.graph import Plan, apply_adapter, find_sites, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.training.reference import attach

SITES = {
    "fc": (6, 6, ()),
    "free": (6, 6, ()),
    "twice": (6, 6, ()),
    "conv": (6, 8, (3,)),
    "around": (6, 6, (3,)),
    "depthwise": (8, 8, (3,)),
    "strided": (2, 4, (3, 3)),
    "zero1": (6, 5, ()),
    "zero2": (6, 5, ()),
    "flat": (6, 6, ()),
    "tied": (6, 7, ()),
}
GROUPED = {"depthwise", "strided"}


@pytest.fixture(scope="module")
def everything(truth):
    """Every part on every site, as far as the PyTorch reference can run it (no LoRA on grouped convolutions)."""
    edits = {}
    for seed, (site, (k, d, kernel)) in enumerate(SITES.items()):
        parts = ("lam", "delta", "lorfa") if site in GROUPED else truth.PARTS
        edits[site] = truth.edit(parts, k, d, kernel, seed=seed)
    return Adapter("vefa", edits)


def outputs(model, feeds):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return list(evaluate(model, [feeds])[0].values())


def torch_outputs(net, feeds, dtype=torch.float64):
    tensors = [torch.from_numpy(feeds[name]) for name in ("ids", "x", "image")]
    with torch.inference_mode():
        return [y.numpy() for y in net(*[t.to(dtype) if t.is_floating_point() else t for t in tensors])]


def close(actual, net, feeds):
    """float32 storage against PyTorch: within 8 times what float32 arithmetic itself does to this very model.

    A fold rounds each of the model's numbers once more; every float32 operation rounds at least as often.
    """
    double = torch_outputs(net, feeds)
    single = torch_outputs(copy.deepcopy(net).float(), feeds, torch.float32)
    noise = [np.abs(s - d).max() for s, d in zip(single, double, strict=True)]
    return [bool(np.abs(a - d).max() <= 8 * n) for a, d, n in zip(actual, double, noise, strict=True)]


class Adapted(torch.nn.Module):
    """The net with an adapter, in whichever dtype it is asked to run."""

    def __init__(self, net, adapter):
        super().__init__()
        self.net, self.adapter = net, adapter

    def float(self):
        return Adapted(self.net.float(), self.adapter)

    def forward(self, *inputs):
        return attach(copy.deepcopy(self.net), self.adapter)(*inputs)


def test_the_sites_of_the_graph(exported):
    _, model, _ = exported
    sites = find_sites(model)
    assert {path: (s.in_features, s.out_features, s.kernel) for path, s in sites.items()} == SITES
    assert len(sites["twice"].uses) == 2
    assert sites["flat"].layout == "dk" and sites["fc"].layout == "kd" and sites["strided"].groups == 2
    assert sites["zero1"].uses[0].bias_value is sites["zero2"].uses[0].bias_value


def test_the_base_is_what_pytorch_computes(exported):
    net, model, feeds = exported
    assert all(close(outputs(model, feeds), net, feeds))


@pytest.mark.parametrize("placement", ["auto", "side-op"])
@pytest.mark.parametrize("site", [*SITES, None])
def test_one_site_and_all_sites(exported, everything, placement, site):
    net, model, feeds = exported
    edits = everything.edits if site is None else {site: everything.edits[site]}
    adapter = Adapter("vefa", edits)
    plan = make_plan(model, adapter, placement=placement)
    actual = outputs(apply_adapter(model, adapter, plan), feeds)
    assert all(close(actual, Adapted(net, adapter), feeds))
    assert not all(close(actual, net, feeds))


def test_the_comparison_sees_one_edit_left_out(exported, everything):
    net, model, feeds = exported
    for site in SITES:
        less = Adapter("vefa", {s: e for s, e in everything.edits.items() if s != site})
        actual = outputs(apply_adapter(model, less, make_plan(model, less)), feeds)
        assert not all(close(actual, Adapted(net, everything), feeds)), site


def test_reasons(exported, everything):
    _, model, _ = exported
    reasons = {e.site: (e.placement, e.reason) for e in make_plan(model, everything).edits}
    assert reasons["conv"] == ("side op", "δ before a zero-padded convolution")
    assert reasons["depthwise"] == reasons["strided"] == ("side op", "low rank before a grouped convolution")
    assert reasons["around"][0] == "own weight"  # padded around, not with zeros
    assert reasons["free"] == ("own weight", "folds into its own weight; adds a bias for δ")
    with pytest.raises(PlanError, match=r"site '\w+' and 2 more cannot fold"):
        make_plan(model, everything, require_fold=True)


@pytest.mark.parametrize("placement", ["auto", "side-op"])
def test_what_the_caller_gave_stays_as_it_was(exported, everything, as_bytes, placement):
    _, model, feeds = exported
    feeds = {name: array.copy() for name, array in feeds.items()}
    arrays = [*everything.tensors().values(), *feeds.values()]
    before = as_bytes(model), [array.tobytes() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    plan = make_plan(model, everything, placement=placement)
    rewritten = apply_adapter(model, everything, plan)
    after_rewrite = as_bytes(rewritten)
    for dtype in ("float64", "float32"):
        evaluate(rewritten, [feeds], dtype=dtype)
        evaluate(model, [feeds], dtype=dtype)
    assert as_bytes(rewritten) == after_rewrite
    assert (as_bytes(model), [array.tobytes() for array in arrays]) == before


@pytest.mark.parametrize("placement", ["auto", "side-op"])
def test_a_plan_is_json_and_replays_to_the_same_bytes(exported, everything, as_bytes, placement):
    _, model, _ = exported
    plan = make_plan(model, everything, placement=placement)
    text = msgspec.json.encode(plan)
    again = msgspec.json.decode(text, type=Plan)
    assert again == plan and msgspec.json.encode(again) == text
    first = as_bytes(apply_adapter(model, everything, plan))
    assert as_bytes(apply_adapter(model, everything, again)) == first
    assert as_bytes(apply_adapter(ir.from_proto(ir.to_proto(model)), everything, again)) == first


def test_a_rewritten_graph_can_be_rewritten_again(exported, truth):
    """The sites are still there, so two adapters in turn are ``W T1(T2(x))``: λ then λ multiplies the scales."""
    _, model, feeds = exported
    one, two = (Adapter("vefa", {"fc": truth.edit(("lam",), 6, 6, seed=s)}) for s in (1, 2))
    for placement in ("auto", "side-op"):
        first = apply_adapter(model, one, make_plan(model, one, placement=placement))
        both = apply_adapter(first, two, make_plan(first, two, placement=placement))
        lam = (1 + one.edits["fc"].lam.astype(np.float64)) * (1 + two.edits["fc"].lam.astype(np.float64)) - 1
        net, _, _ = exported
        product = Adapter("vefa", {"fc": type(one.edits["fc"])(lam=lam)})
        assert all(close(outputs(both, feeds), Adapted(net, product), feeds))


def test_unknown_sites_and_modules(exported, truth):
    _, model, _ = exported
    with pytest.raises(SiteError, match=r"site 'fc3' not found; sites in this graph: .*\bfc\b"):
        make_plan(model, Adapter("vefa", {"fc3": truth.edit(("lam",), 6, 6)}))
    with pytest.raises(SiteError, match="site 'head' not found"):
        make_plan(model, Adapter("vefa", {}, {"head": {"weight": np.ones((2, 2))}}))


def test_a_plan_for_less_than_the_adapter(exported, everything):
    _, model, _ = exported
    less = Adapter("vefa", {"fc": everything.edits["fc"]})
    with pytest.raises(LeftoverError, match=r"leaves 'edit/around/A' and \d+ more of the adapter unused"):
        apply_adapter(model, everything, make_plan(model, less))
    head = Adapter("vefa", less.edits, {"flat": {"weight": np.ones((6, 6)), "bias": np.ones(6)}})
    with pytest.raises(LeftoverError, match="leaves 'module/flat/bias' and 1 more"):
        apply_adapter(model, head, make_plan(model, less))


def test_a_plan_for_another_adapter_or_graph(exported, everything, builder):
    _, model, _ = exported
    plan = make_plan(model, everything)
    less = Adapter("vefa", {"fc": everything.edits["fc"]})
    with pytest.raises(PlanError, match="names 'around', which the adapter does not change"):
        apply_adapter(model, less, plan)
    g = builder()
    other = g.model(g.op("MatMul", g.input("x", 1, 6), g.const("w", np.ones((6, 6))), site="other", out="y"))
    with pytest.raises(SiteError, match=r"not found; sites in this graph: other"):
        apply_adapter(other, everything, plan)
    forced = msgspec.structs.replace(
        plan, edits=[msgspec.structs.replace(edit, placement="own weight") for edit in plan.edits]
    )
    with pytest.raises(PlanError, match=r"cannot fold as the plan says: .*; make a new plan"):
        apply_adapter(model, everything, forced)
    twice = msgspec.structs.replace(plan, edits=[*plan.edits, plan.edits[0]])
    with pytest.raises(PlanError, match="places one edit twice"):
        apply_adapter(model, everything, twice)


def test_a_replaced_norm_leaves_its_merged_twin_alone(exported):
    """The exporter merged the two norms, equal at the start, into one initializer; only one of them is replaced."""
    net, model, feeds = exported
    assert "norm1.weight" in model.graph.initializers and "norm2.weight" not in model.graph.initializers
    arrays = {"weight": np.linspace(0.5, 2, 6, dtype=np.float32), "bias": np.linspace(-1, 1, 6, dtype=np.float32)}
    head = Adapter("vefa", {}, {"norm1": arrays})
    actual = outputs(apply_adapter(model, head, make_plan(model, head)), feeds)
    assert all(close(actual, Adapted(net, head), feeds))
    assert not all(close(actual, net, feeds))
