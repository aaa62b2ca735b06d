"""Adapters of every kind, a way to write a ``.pt`` by hand, and tiny models that PEFT adapts."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit, LowRank
from deployfa.training.reference import attach

torch.set_num_threads(1)

DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}


def _adapter(method: str, dtype: str = "float32") -> Adapter:
    rng = np.random.default_rng(0)

    def draw(*shape: int):
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    edits = {
        "vefa": lambda: Edit(lam=draw(4), delta=draw(4)),
        "lorfa": lambda: Edit(input_low_rank=LowRank(draw(2, 4), draw(4, 2), 0.75), delta=draw(4)),
        "lora": lambda: Edit(output_low_rank=LowRank(draw(2, 4), draw(3, 2), 0.75)),
        "ia3": lambda: Edit(lam=draw(4)),
    }
    alpha = {"lorfa": {"r": 2, "alpha": 1.5}, "lora": {"r": 2, "lora_alpha": 1.5}}.get(method, {})
    return Adapter(
        method=method,
        edits={site: edits[method]() for site in ("fc1", "layer.0.fc2")},
        modules={"classifier": {"weight": draw(2, 4), "bias": draw(2)}},
        base=BaseReference(name="some/base", fingerprint="sha256:" + "ab" * 32, architecture="Bert", task="text"),
        labels=("neg", "più"),
        config={"target_modules": ["fc1", "fc2"], "modules_to_save": ["classifier"], **alpha},
        training={"seed": 1, "loss": 0.125, "nested": {"list": [1, None, True, "x"]}},
    )


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """``(method, dtype)`` → an adapter with two sites, a head and metadata of every JSON type."""
    return _adapter


@pytest.fixture
def write_pt(tmp_path: Path) -> Callable[..., Path]:
    """``(pickle bytes, storages)`` → a file as ``torch.save`` lays it out, whatever the pickle says."""

    def write(pickled: bytes, storages: Mapping[str, bytes] = {}, *, members: Mapping[str, bytes] = {}, **how) -> Path:
        path = tmp_path / "made.pt"
        with zipfile.ZipFile(path, "w", **how) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", b"little")
            for key, data in storages.items():
                archive.writestr(f"archive/data/{key}", data)
            for name, data in members.items():
                archive.writestr(name, data)
        return path

    return write


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.groups = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.line = torch.nn.Conv1d(4, 5, 3, padding=1)
        self.linear = torch.nn.Linear(5, 5)

    def forward(self, x):
        h = torch.relu(self.groups(torch.relu(self.conv(x)))).flatten(2)
        return self.linear(torch.relu(self.line(h)).transpose(1, 2))


@pytest.fixture(scope="module")
def convolutions():
    torch.manual_seed(3)
    return Convolutions().eval()


def _logits(model, dtype=torch.float64):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, Convolutions):
        feed = {"x": torch.linspace(-1, 1, 2 * 3 * 5 * 5, dtype=dtype).reshape(2, 3, 5, 5)}
    else:
        feed = {"input_ids": torch.arange(12).reshape(2, 6)}
    with torch.inference_mode():
        y = model(**feed)
    return (y if isinstance(y, torch.Tensor) else y.logits).numpy()


def _perturbed(model, config):
    """``model`` with the adapter in float64, every trained number away from its start."""
    adapted = get_peft_model(copy.deepcopy(model).double(), config).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return adapted


def _same_effect(model, adapted, adapter):
    """Both compute in float64, in another order: within 16 times the noise that float64 has on this model, which is
    2^-29 of the one that float32 has."""
    theirs = _logits(adapted)
    noise = np.abs(_logits(copy.deepcopy(adapted).float(), torch.float32) - theirs).max() * 2.0**-29
    ours = _logits(attach(copy.deepcopy(model).double(), adapter))
    assert np.abs(theirs - _logits(copy.deepcopy(model).double())).max() > 1e6 * noise  # it does something
    return bool(np.abs(ours - theirs).max() <= 16 * noise)


@pytest.fixture
def logits():
    """``(model, dtype)`` → what the model answers to a fixed feed."""
    return _logits


@pytest.fixture
def perturbed():
    """``(model, PEFT config)`` → the adapted model, see ``_perturbed``."""
    return _perturbed


@pytest.fixture
def same_effect():
    """``(model, adapted model, adapter)`` → whether the adapter's edits do what PEFT does, see ``_same_effect``."""
    return _same_effect
