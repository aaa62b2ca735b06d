"""One site at a time: what the layer computes, what it folds to, and what it puts back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from deployfa.edits import Edit, LowRank, apply_input
from deployfa.training.tuners import LoRFAConfig, VeFAConfig

torch.set_num_threads(1)

RANK, ALPHA = 3, 6.0
CONFIGS = {"vefa": VeFAConfig, "lorfa": LoRFAConfig}


def conv1d(k: int, d: int) -> Conv1D:
    layer = Conv1D(d, k)
    nn.init.normal_(layer.bias)
    return layer


SITES = {
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
    "linear square": (lambda: nn.Linear(6, 6), (2, 5, 6)),
    "linear square no bias": (lambda: nn.Linear(6, 6, bias=False), (5, 6)),
    "linear wide no bias": (lambda: nn.Linear(4, 6, bias=False), (5, 4)),
    "conv1d": (lambda: conv1d(6, 4), (2, 5, 6)),
    "conv1d square": (lambda: conv1d(6, 6), (2, 5, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "conv no batch": (lambda: nn.Conv2d(4, 6, 3, stride=2), (4, 5, 5)),
    "conv square 1x1 no bias": (lambda: nn.Conv2d(4, 4, 1, bias=False), (2, 4, 3, 3)),
    "conv reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "conv circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "conv replicate": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate"), (2, 4, 5, 5)),
    "conv groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv groups square": (lambda: nn.Conv2d(4, 4, 3, groups=2), (2, 4, 5, 5)),
    "conv depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "conv zero padding": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
}
SQUARE = [name for name in SITES if "square" in name]
CASES = [(method, site, bias) for method in CONFIGS for site in SITES for bias in ("none", "shift")]


def folds(method, site, bias):
    grouped = "groups" in site or "depthwise" in site
    return not (method == "lorfa" and grouped) and not (bias == "shift" and site == "conv zero padding")


FOLDING = [case for case in CASES if folds(*case)]


def adapted(method, layer, bias, **config):
    """A float64 model with one adapted site, ``layer``'s own copy untouched."""
    if method == "lorfa":
        config = {"r": RANK, "alpha": ALPHA, **config}
    model = nn.Sequential()
    model.add_module("site", copy.deepcopy(layer))
    return get_peft_model(model, CONFIGS[method](target_modules=["site"], bias=bias, **config))


def site_of(model):
    return model.base_model.model.site


def perturb(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)


def edit_of(model, method, absolute=False):
    """The edit, put together from the named parameters, not by the layer's own code."""
    found = {
        name.split(".")[-2].split("_")[1]: p.detach().double().numpy()
        for name, p in model.named_parameters()
        if f".{method}_" in name
    }
    if absolute:
        found = {name: np.abs(a) for name, a in found.items()}
    low = LowRank(found["A"], found["B"], ALPHA / RANK) if "A" in found else None
    return Edit(found.get("lambda"), low, found.get("delta"))


def expected_and_bound(model, method, layer, x, axis):
    """``W T(x) + c`` in float64, and how far another order of the same sums may be from it.

    An output is a sum over the fan-in, twice with a fold of δ, of products with T, itself a sum over k + r; such a
    sum, in any order, is within (number of terms) · u of the exact one, times the same sum over absolute values
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).  Two such sums are compared: twice that.
    """
    expected = layer(torch.from_numpy(apply_input(edit_of(model, method), x.numpy(), axis=axis)))
    positive = copy.deepcopy(layer)
    for parameter in positive.parameters():
        parameter.data = parameter.data.abs()
    edit = edit_of(model, method, absolute=True)
    magnitude = positive(torch.from_numpy(apply_input(edit, x.abs().numpy(), axis=axis)))
    fan_in = layer.weight.numel() // expected.shape[axis]
    terms = 2 * fan_in + x.shape[axis] + RANK + 4
    return expected.detach(), 2 * terms * 2.0**-53 * magnitude.detach()


def agree(actual, expected, bound):
    return bool(((actual.detach() - expected).abs() <= bound).all())


def make(method, site, bias):
    torch.manual_seed(0)
    build, shape = SITES[site]
    layer = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    model = adapted(method, layer, bias).double()
    return layer, x, model, -3 if site.startswith("conv ") or site == "conv" else -1


@pytest.mark.parametrize(("method", "site", "bias"), CASES)
def test_starts_as_the_base_bit_for_bit(method, site, bias):
    layer, x, model, _ = make(method, site, bias)
    assert torch.equal(model(x), layer(x))
    assert torch.equal(model.float()(x.float()), layer.float()(x.float()))


@pytest.mark.parametrize(("method", "site", "bias"), CASES)
def test_forward_is_the_formula(method, site, bias):
    layer, x, model, axis = make(method, site, bias)
    perturb(model)
    expected, bound = expected_and_bound(model, method, layer, x, axis)
    assert agree(model(x), expected, bound)
    assert not agree(layer(x), expected, bound)  # the adapter does something


@pytest.mark.parametrize(("method", "site", "bias"), FOLDING)
def test_merge_is_the_same_and_unmerge_is_the_same_bits(method, site, bias):
    layer, x, model, axis = make(method, site, bias)
    perturb(model)
    expected, bound = expected_and_bound(model, method, layer, x, axis)
    adapter_output = model(x)
    before = dict(model.get_base_model().named_parameters())
    model.merge_adapter(safe_merge=True)
    assert site_of(model).merged
    assert agree(model(x), expected, bound)
    model.unmerge_adapter()
    assert torch.equal(model(x), adapter_output)
    after = dict(model.get_base_model().named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(site_of(model).base_layer.weight, layer.weight)


@pytest.mark.parametrize(("method", "site", "bias"), FOLDING)
def test_merge_and_unload_leaves_a_plain_layer(method, site, bias):
    layer, x, model, axis = make(method, site, bias)
    perturb(model)
    expected, bound = expected_and_bound(model, method, layer, x, axis)
    merged = model.merge_and_unload()
    assert type(merged.site) is type(layer)
    assert agree(merged(x), expected, bound)
    assert (merged.site.bias is not None) == (layer.bias is not None or bias == "shift")


@pytest.mark.parametrize(
    ("method", "site"), [(method, site) for method in CONFIGS for site in SQUARE if folds(method, site, "none")]
)
def test_a_fold_on_the_wrong_axis_is_seen(method, site):
    """The comparison of the tests above, given λ on the outputs or BA transposed: the shapes of a square W allow it."""
    layer, x, model, axis = make(method, site, "none")
    perturb(model)
    expected, bound = expected_and_bound(model, method, layer, x, axis)
    edit = edit_of(model, method)
    merged = model.merge_and_unload()
    assert agree(merged(x), expected, bound)
    weight = layer.weight.detach().numpy()
    if method == "vefa":
        outputs = np.moveaxis(weight, 1 if isinstance(layer, Conv1D) else 0, -1)
        wrong = np.moveaxis(outputs * (1 + edit.lam), -1, 1 if isinstance(layer, Conv1D) else 0)
    else:
        inputs = np.moveaxis(weight, 0 if isinstance(layer, Conv1D) else 1, -1)
        wrong = np.moveaxis(inputs + inputs @ edit.input_low_rank.delta().T, -1, 0 if isinstance(layer, Conv1D) else 1)
    assert wrong.shape == weight.shape
    merged.site.weight.data = torch.from_numpy(np.ascontiguousarray(wrong))
    assert not agree(merged(x), expected, bound)


def test_a_dropped_shift_is_seen():
    layer, x, model, axis = make("vefa", "linear", "shift")
    perturb(model)
    expected, bound = expected_and_bound(model, "vefa", layer, x, axis)
    merged = model.merge_and_unload()
    merged.site.bias.data = layer.bias.data
    assert not agree(merged(x), expected, bound)


def test_merge_is_cast_once():
    torch.manual_seed(0)
    layer = nn.Linear(32, 32).bfloat16()
    model = adapted("vefa", layer, "none")
    perturb(model)
    lam = site_of(model).vefa_lambda["default"]
    assert lam.dtype == torch.float32
    exact = layer.weight.double() * (1 + lam.double())
    assert torch.equal(model.merge_and_unload().site.weight, exact.to(torch.bfloat16))


def test_a_tied_weight_leaves_its_twin_alone():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    table = model["embedding"].weight.detach().clone()
    peft = get_peft_model(model, VeFAConfig(target_modules=["head"]))
    perturb(peft)
    peft.merge_adapter()
    assert torch.equal(model["embedding"].weight, table)
    assert not torch.equal(model["head"].base_layer.weight, table)
    peft.unmerge_adapter()
    assert model["head"].base_layer.weight is model["embedding"].weight


def test_dropout_acts_while_training_only_and_never_on_x_itself():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    model = adapted("lorfa", layer, "none", dropout=0.5)
    x = torch.randn(3, 64)
    assert torch.equal(model.train()(x), layer(x))  # B is 0: only the low-rank path is dropped from
    perturb(model)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
