"""What is refused, with which reason, and that a refusal leaves everything as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from deployfa.errors import EditError, InputError, PlanError, SiteError
from deployfa.training.tuners import LoRFAConfig, VeFAConfig

torch.set_num_threads(1)

CONFIGS = {"vefa": VeFAConfig, "lorfa": LoRFAConfig}


def adapted(method, layer, bias):
    model = nn.Sequential()
    model.add_module("site", layer)
    return get_peft_model(model, CONFIGS[method](target_modules=["site"], bias=bias))


def site_of(model):
    return model.base_model.model.site


def perturb(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("padding", [1, "same"])
def test_shift_before_zero_padding_is_refused_and_nothing_changes(method, padding):
    layer = nn.Conv2d(4, 4, 3, padding=padding)
    weight = layer.weight
    model = adapted(method, layer, "shift")
    with pytest.raises(PlanError, match=r"^site 'site': δ does not fold through zero padding.*;"):
        model.merge_and_unload()
    assert not site_of(model).merged
    assert site_of(model).base_layer.weight is weight


def test_a_1x1_kernel_with_same_padding_pads_nothing_and_folds():
    model = adapted("vefa", nn.Conv2d(4, 4, 1, padding="same"), "shift")
    assert isinstance(model.merge_and_unload().site, nn.Conv2d)


def test_low_rank_before_a_grouped_convolution_is_refused():
    model = adapted("lorfa", nn.Conv2d(4, 4, 3, groups=2), "none")
    with pytest.raises(EditError, match="grouped convolution"):
        model.merge_adapter()


def test_merge_is_all_sites_or_none():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, padding=1))
    x = torch.randn(1, 4, 6, 6)
    model = get_peft_model(model, VeFAConfig(target_modules=["0", "1"], bias="shift"))
    perturb(model)
    before = model(x)
    with pytest.raises(PlanError, match="site '1'"):
        model.merge_adapter()
    assert [layer.merged for layer in model.get_base_model()] == [False, False]
    assert model.get_base_model()[0].base_layer.bias is None
    assert torch.equal(model(x), before)


def test_safe_merge_refuses_what_does_not_fit_the_dtype():
    model = adapted("vefa", nn.Linear(4, 4).half(), "none")
    with torch.no_grad():
        site_of(model).vefa_lambda["default"].fill_(1e6)
    before = site_of(model).base_layer.weight.clone()
    with pytest.raises(EditError, match=r"NaN or infinity in torch\.float16"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(site_of(model).base_layer.weight, before)


def test_quantised_weight_is_refused():
    model = adapted("vefa", nn.Linear(4, 4), "none")
    site_of(model).base_layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PlanError, match="quantised"):
        model.merge_adapter()


@pytest.mark.parametrize(
    "module", [nn.Embedding(4, 4), nn.LayerNorm(4), nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(4, 4, 3)]
)
@pytest.mark.parametrize("method", CONFIGS)
def test_unsupported_module_is_refused_before_anything_is_replaced(method, module):
    model = nn.Sequential(nn.Linear(4, 4), module)
    with pytest.raises(SiteError, match=f"^site '1' is a {type(module).__name__}; target"):
        get_peft_model(model, CONFIGS[method](target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear


def test_layers_that_are_read_and_not_called_are_refused():
    attention = nn.MultiheadAttention(4, 1)
    with pytest.raises(SiteError, match="never calls it"):
        get_peft_model(attention, VeFAConfig(target_modules=["out_proj"]))
    encoder = nn.TransformerEncoderLayer(4, 1, dim_feedforward=4, batch_first=True)
    with pytest.raises(SiteError, match="fast path"):
        get_peft_model(encoder, VeFAConfig(target_modules=["linear1"]))
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model = get_peft_model(encoder, VeFAConfig(target_modules=["linear1"])).eval()
        x = torch.randn(1, 2, 4)
        with torch.no_grad():
            before = model(x)
            perturb(model)
            assert not torch.equal(model(x), before)  # which is what the fast path would have made equal
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_another_tuner_underneath_is_refused():
    model = adapted("lorfa", nn.Linear(4, 4), "none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: the model is wrapped a second time
        with pytest.raises(SiteError, match="has a LoRFALinear already"):
            get_peft_model(model.get_base_model(), VeFAConfig(target_modules=["site"]))


@pytest.mark.parametrize(
    ("make_config", "text"),
    [
        (lambda: VeFAConfig(bias="all"), "bias is 'all'"),
        (lambda: VeFAConfig(share_groups=[["q", "k"], ["q", "v"]]), "names 'q' twice"),
        (lambda: LoRFAConfig(r=0), "r is 0"),
        (lambda: LoRFAConfig(dropout=1.0), r"dropout is 1\.0"),
    ],
)
def test_meaningless_config_is_refused(make_config, text):
    with pytest.raises(InputError, match=text):
        make_config()
