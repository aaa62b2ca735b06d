"""A tiny random CLIP as a classifier of names, held against the whole CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deployfa.adapter import Adapter
from deployfa.errors import InputError
from deployfa.models import load_recipe
from deployfa.parity import verify
from deployfa.pipeline import export
from deployfa.train import train
from deployfa.training.base import base_fingerprint, load_base
from deployfa.training.zero_shot import TEMPLATE

from .tiny_pictures import PROCESSORS, SIZE, save_pictures, save_tiny

TASK = "zero-shot-image-classification"
WORDS = ["<|startoftext|>", "<|endoftext|>", "[UNK]", "a", "photo", "of", "lying", "standing", ".", "big"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel with a tokenizer of words, as from_pretrained wants them."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>", bos_token="<|startoftext|>"
    ).save_pretrained(folder)
    size: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    text = {**size, "vocab_size": len(WORDS), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = tf.CLIPConfig(
        text_config={**text, "pad_token_id": 1},
        vision_config={**size, "image_size": SIZE, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = tf.CLIPModel(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS["clip"]))
    return folder


def test_equal_to_the_whole_clip(clip: Path) -> None:
    labels = ["lying", "big standing", "photo"]
    base = load_base(clip, TASK, labels=labels)
    whole: Any = tf.CLIPModel.from_pretrained(clip).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(clip)
    tokens = tokenizer([TEMPLATE.format(label=label) for label in labels], padding=True, return_tensors="pt")
    pixels = torch.randn(5, 3, SIZE, SIZE)
    with torch.inference_mode():
        wanted = whole(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels
        ).logits_per_image
        found = base.model(pixels).logits
    assert found.shape == (5, 3)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(wanted[:, 0], wanted[:, 1])
    assert [base.model.config.id2label[n] for n in range(3)] == labels
    assert base.fresh_modules == ()


def fit(clip: Path, folder: Path, **options: Any) -> Path:
    recipe = load_recipe("clip_zero_shot")
    out = folder / ("full" if options.get("method") == "full" else "vefa.pt")
    train(
        model=clip,
        task=TASK,
        train_file=save_pictures(folder / "stripes.npz"),
        eval_file=None,
        shifted_files={},
        out=out,
        options={"method": "vefa", "learning_rate": 0.05, "epochs": 1, "sites": recipe.sites, **options},
    )
    return out


def test_train_export_verify(clip: Path, tmp_path: Path) -> None:
    adapter = Adapter.load(fit(clip, tmp_path))
    # the towers stay, only the edits are new
    assert adapter.modules == {}
    assert len(adapter.edits) == 4
    exported = export(adapter, tmp_path / "bundle", optimize="none")
    assert exported.bundle.labels == ["lying", "standing"]
    # no text tower comes along
    names = [value.name for value in exported.bundle.manifest.graph.inputs]
    assert names == ["pixel_values"]
    for use_torch in (True, False):
        report = verify(exported.bundle, use_torch=use_torch)
        assert report.passed, report.reason


def test_other_names_are_another_base(clip: Path) -> None:
    prints = [base_fingerprint(load_base(clip, TASK, labels=["lying", name]).model) for name in ("big", "photo", "big")]
    assert prints[0] == prints[2] != prints[1]


def test_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no whole model"):
        fit(clip, tmp_path, method="full")
    with pytest.raises(InputError, match="made of the names of the labels"):
        load_base(clip, TASK, labels=None)
    with pytest.raises(InputError, match="is a ViTModel"):
        load_base(save_tiny("vit", tmp_path / "vit"), TASK, labels=["a", "b"])
    assert np.load(tmp_path / "stripes.npz")["images"].shape[0] == 24
