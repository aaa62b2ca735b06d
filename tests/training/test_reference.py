"""The truth of verify, held against the PEFT tuners and against PEFT's LoRA: two implementations of one formula."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from deployfa import LoRFAConfig, VeFAConfig
from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit, LowRank
from deployfa.errors import EditError, SiteError
from deployfa.training.base import base_fingerprint
from deployfa.training.capture import capture
from deployfa.training.reference import attach, float64_throughout

CONFIGS = {
    "vefa": lambda **k: VeFAConfig(**k),
    "vefa-shift": lambda **k: VeFAConfig(**k, bias="shift"),
    "lorfa": lambda **k: LoRFAConfig(**k, r=3, alpha=5),
    "lorfa-shift": lambda **k: LoRFAConfig(**k, r=3, alpha=5, bias="shift"),
    "lora": lambda **k: peft.LoraConfig(**k, r=3, lora_alpha=5),
    "ia3": lambda **k: peft.IA3Config(**k, feedforward_modules=["dense"]),
}


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval().double()


def _perturbed(model: nn.Module, method: str) -> peft.PeftModel:
    config = CONFIGS[method](target_modules=["query", "value", "dense"], modules_to_save=["classifier"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter), alpha=1.0)
                assert "modules_to_save" in name or "vefa" in name or "lor" in name or "ia3" in name
    return adapted.eval().double()


FEEDS = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_hooks_and_tuners_agree_in_float64(method: str) -> None:
    base = _bert()
    adapted = _perturbed(base, method)
    adapter = capture(adapted)
    with torch.inference_mode():
        expected = adapted(**FEEDS).logits
        found = attach(copy.deepcopy(base), adapter)(**FEEDS).logits
        plain = base(**FEEDS).logits
    # the adapter is kept in the dtype of training; both sides read the same numbers, so float64 rounding is all
    assert (found - expected).norm() <= 64 * 2.0**-53 * expected.norm()
    assert (plain - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("method", CONFIGS)
def test_a_wrong_tensor_is_seen(method: str) -> None:
    base = _bert()
    adapted = _perturbed(base, method)
    adapter = capture(adapted)
    site = next(iter(adapter.edits))
    tensors = {name: array.copy() for name, array in adapter.edits[site].tensors().items()}
    name = next(name for name in ("lambda", "B", "out_B", "out_lambda") if name in tensors)
    tensors[name][[0, 1]] = tensors[name][[1, 0]]
    wrong = Adapter(adapter.method, {**adapter.edits, site: Edit.from_tensors(site, tensors)}, adapter.modules)
    with torch.inference_mode():
        expected = adapted(**FEEDS).logits
        found = attach(copy.deepcopy(base), wrong)(**FEEDS).logits
    assert (found - expected).norm() > 64 * 2.0**-53 * expected.norm()


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    edits = {"0": Edit(lam=np.linspace(-0.5, 0.5, 4), delta=np.linspace(0.1, 0.4, 4))}
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    scale, shift = (torch.tensor(a).reshape(4, 1, 1) for a in (1 + edits["0"].lam, edits["0"].delta))
    with torch.inference_mode():
        expected = model(x * scale + shift)
        found = attach(copy.deepcopy(model), Adapter("vefa", edits))(x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d", "gpt2"])
def test_an_output_scale_scales_the_bias_and_what_lora_adds(kind: str) -> None:
    """``(1 + λ') (W T(x) + c + s' B' A' x)``, written out."""
    torch.manual_seed(0)
    axes = int(kind[4]) if kind.startswith("conv") else 0
    layer = {
        "linear": lambda: nn.Linear(4, 6),
        "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
        "conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
        "conv3d": lambda: nn.Conv3d(4, 6, 3, padding="same"),
        "gpt2": lambda: transformers.pytorch_utils.Conv1D(6, 4),
    }[kind]()
    model = nn.Sequential(layer).double()
    nn.init.normal_(layer.bias)
    rng = np.random.default_rng(0)
    low = LowRank(rng.standard_normal((2, 4)), rng.standard_normal((6, 2)), 1.5)
    if axes:
        low = LowRank(rng.standard_normal((2, 4, *[3] * axes)), low.b, low.s)
    edit = Edit(rng.standard_normal(4), output_low_rank=low, output_scale=rng.standard_normal(6))
    x = torch.randn(2, *([4] + [5] * axes if axes else [5, 4]), dtype=torch.float64)

    def along(vector: np.ndarray) -> torch.Tensor:
        return torch.tensor(vector).reshape(-1, *[1] * axes)

    with torch.inference_mode():
        changed = copy.deepcopy(layer)
        changed.bias.zero_()
        delta = torch.tensor(low.delta())
        changed.weight.copy_(delta.T if kind == "gpt2" else delta)
        expected = (layer(x * along(1 + edit.lam)) + changed(x)) * along(1 + edit.output_scale)
        found = attach(copy.deepcopy(model), Adapter("x", {"0": edit}))(x)
        wrong = attach(copy.deepcopy(model), Adapter("x", {"0": Edit(edit.lam, output_low_rank=low)}))(x)
    assert (found - expected).norm() <= 64 * 2.0**-53 * expected.norm()
    assert (wrong - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolutions_have_channels_first_too(axes: int) -> None:
    """Width equal to the channels: scaled along the wrong axis, it would run and be wrong."""
    torch.manual_seed(0)
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    model = nn.Sequential(layer(4, 4, 1)).double()
    edit = Edit(np.linspace(-0.5, 0.5, 4), delta=np.linspace(1, 2, 4), output_scale=np.linspace(2, 3, 4))
    x = torch.randn(2, *[4] * (axes + 1), dtype=torch.float64)
    lam, delta, scale = (torch.tensor(a).reshape(4, *[1] * axes) for a in (edit.lam, edit.delta, edit.output_scale))
    low = LowRank(np.ones((1, 4)), np.ones((4, 1)), 1.0)
    with torch.inference_mode():
        expected = model(x * (1 + lam) + delta) * (1 + scale)
        assert torch.equal(attach(copy.deepcopy(model), Adapter("x", {"0": edit}))(x), expected)
    with pytest.raises(EditError, match="LoRA of a transposed convolution"):
        attach(model, Adapter("lora", {"0": Edit(output_low_rank=low)}))


def test_a_module_without_a_weight_is_no_site() -> None:
    with pytest.raises(SiteError, match=r"bert\.encoder.*not found"):
        attach(_bert(), Adapter("vefa", {"bert.encoder": Edit(lam=np.ones(16))}))


def test_a_site_or_a_parameter_that_the_model_lacks_is_named() -> None:
    with pytest.raises(SiteError, match=r"bert\.nowhere.*not found"):
        attach(_bert(), Adapter("vefa", {"bert.nowhere": Edit(lam=np.ones(16))}))
    with pytest.raises(SiteError, match=r"classifier\.weight.*shape \(5, 16\)"):
        attach(_bert(), Adapter("vefa", {}, {"classifier": {"weight": np.ones((5, 16))}}))


@pytest.mark.parametrize("edit", ["lam", "delta", "output_scale"])
def test_an_edit_goes_where_the_model_is(edit: str) -> None:
    # the meta device, like a GPU, refuses tensors of another device
    edits = {"0": Edit(**{edit: np.ones(4, np.float32)})}
    module = attach(nn.Sequential(nn.Linear(4, 4)).to("meta", torch.float16), Adapter("vefa", edits))
    answer = module(torch.empty(3, 4, device="meta", dtype=torch.float16))
    assert (answer.device.type, answer.dtype, answer.shape) == ("meta", torch.float16, (3, 4))


def test_the_fingerprint_looks_through_adapters_and_skips_the_head() -> None:
    base = _bert()
    plain = base_fingerprint(base, without=["classifier"])
    for method in CONFIGS:
        assert base_fingerprint(_perturbed(base, method), without=["classifier"]) == plain
    with torch.no_grad():
        base.bert.encoder.layer[0].output.dense.bias[0] += 1e-12
    assert base_fingerprint(base, without=["classifier"]) != plain
    assert BaseReference().fingerprint is None


def test_float64_reaches_code_that_asks_for_float32_by_name() -> None:
    """Llama's norm computes in float32 whatever its dtype; the truth must not have that rounding."""
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8).double()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    array = x.numpy()
    exact = array / np.sqrt((array**2).mean(-1, keepdims=True) + norm.variance_epsilon)
    with torch.inference_mode(), float64_throughout():
        assert np.abs(norm(x).numpy() - exact).max() < 1e-14
        assert torch.zeros(2, dtype=torch.float32).dtype == x.float().dtype == torch.float64
    with torch.inference_mode():
        assert np.abs(norm(x).numpy() - exact).max() > 1e-9, "without it the norm rounds to float32"
    assert torch.zeros(2, dtype=torch.float32).dtype == torch.float32
