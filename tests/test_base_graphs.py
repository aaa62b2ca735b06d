"""Base graphs of other models than the demo's: own heads, plain PEFT checkpoints, a damaged or unwritable cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

from deployfa import LoRFAConfig, VeFAConfig
from deployfa.adapter import Adapter
from deployfa.base_graphs import base_graph
from deployfa.bundle import Bundle
from deployfa.errors import BaseMismatchError, InputError, StorageError
from deployfa.parity import verify
from deployfa.pipeline import export, fused_base
from deployfa.predict import Predictor
from deployfa.training.base import load_base

TARGETS = ["query", "key", "value", "dense"]
AUTO = transformers.AutoModelForSequenceClassification


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEPLOYFA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bases(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``headless``: a tiny BERT; ``three``: one with its own head for bad, mid, good; MiniLM's tokenizer in both."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_dir)
    sizes = {
        "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    names = ["bad", "mid", "good"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    torch.manual_seed(0)
    models = {
        "headless": transformers.BertModel(transformers.BertConfig(**sizes)),
        "three": transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **labels)),
    }
    folder = tmp_path_factory.mktemp("bases")
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


def checkpoint(base: Path, out: Path, config: peft.PeftConfig, **options: object) -> Adapter:
    """What plain PEFT saves of a trained adapter: no labels, no fingerprint."""
    model = peft.get_peft_model(AUTO.from_pretrained(base, **options), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return Adapter.load(out)


@pytest.mark.parametrize(
    "config",
    [
        VeFAConfig(target_modules=TARGETS),
        LoRFAConfig(target_modules=TARGETS, r=2, alpha=4),
        peft.LoraConfig(target_modules=TARGETS, r=2, lora_alpha=4),
        VeFAConfig(target_modules=TARGETS, task_type="SEQ_CLS"),
    ],
    ids=["vefa", "lorfa", "lora", "head saved too"],
)
def test_a_plain_checkpoint_keeps_the_base_models_own_head(bases, tmp_path, config) -> None:
    exported = export(checkpoint(bases["three"], tmp_path / "p", config), tmp_path / "b", optimize="none")
    assert exported.bundle.manifest.labels == ["bad", "mid", "good"]
    report = verify(exported.bundle, use_torch=True)
    assert report.passed, report.reason
    (answer,) = Predictor(exported.bundle).answer(["a good film"])
    assert set(answer.scores) == {"bad", "mid", "good"}


def test_a_plain_checkpoint_with_its_own_number_of_labels(bases, tmp_path) -> None:
    config = VeFAConfig(target_modules=TARGETS, modules_to_save=["classifier"])
    adapter = checkpoint(bases["headless"], tmp_path / "p", config, num_labels=5)
    exported = export(adapter, tmp_path / "b", optimize="none")
    assert exported.bundle.manifest.labels == [f"LABEL_{number}" for number in range(5)]
    assert verify(exported.bundle, use_torch=True).passed


def test_a_head_that_nobody_brings_is_refused(bases, tmp_path) -> None:
    adapter = checkpoint(bases["headless"], tmp_path / "p", VeFAConfig(target_modules=TARGETS))
    with pytest.raises(InputError, match="'classifier', so it would answer at random"):
        export(adapter, tmp_path / "b", optimize="none")
    assert not (tmp_path / "b").exists()


def test_a_relative_model_is_found_from_another_directory(bases, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(bases["three"].parent)
    base = load_base("three", "text-classification", labels=None)
    assert base.name == str(bases["three"].resolve())
    adapter = checkpoint(bases["three"], tmp_path / "p", VeFAConfig(target_modules=TARGETS))
    bundle = export(adapter, tmp_path / "b", model="three", optimize="none").bundle
    assert Path(bundle.manifest.base.name).is_absolute()
    monkeypatch.chdir(tmp_path)
    assert verify(bundle, use_torch=True).passed


def test_after_an_allowed_mismatch_the_base_is_the_one_exported_on(bases, tmp_path) -> None:
    from deployfa.training.capture import capture

    other = tmp_path / "other"
    shutil.copytree(bases["three"], other)
    model = AUTO.from_pretrained(other)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(1.5)
    model.save_pretrained(other)
    tuned = peft.get_peft_model(AUTO.from_pretrained(bases["three"]), VeFAConfig(target_modules=TARGETS))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter = capture(tuned, base_name=str(bases["three"]), labels=["bad", "mid", "good"])
    base_graph(adapter)  # the right base lies in the cache, a trap for what follows
    with pytest.raises(BaseMismatchError):
        export(adapter, tmp_path / "b", model=other, optimize="none")
    bundle = export(adapter, tmp_path / "b", model=other, optimize="none", allow_base_mismatch=True).bundle
    assert verify(bundle, use_torch=True).passed
    with pytest.raises(BaseMismatchError):
        verify(bundle, use_torch=True, model=bases["three"])
    (tmp_path / "fused").mkdir()
    assert fused_base(bundle, tmp_path / "fused").is_file()


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.onnx.data", 1000)


def _flip(folder: Path) -> None:
    with (folder / "model.onnx.data").open("r+b") as stream:
        stream.seek(500)
        byte = stream.read(1)
        stream.seek(500)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip, lambda f: (f / "model.onnx").write_bytes(b""), lambda f: (f / "tokenizer.json").unlink()],
    ids=["cut weights", "one bit", "empty graph", "no tokenizer"],
)
def test_a_damaged_cache_entry_is_made_again(bases, tmp_path, damage) -> None:
    from deployfa.training.capture import head_only

    model = load_base(bases["headless"], "text-classification", labels=["no", "yes"]).model
    adapter = head_only(
        model, ["classifier"], base_name=str(bases["headless"]), task="text-classification", labels=["no", "yes"],
        training={},
    )  # fmt: skip
    first = base_graph(adapter)
    assert first.made_now and not base_graph(adapter).made_now
    damage(first.folder)
    assert base_graph(adapter).made_now
    assert not base_graph(adapter).made_now


def test_a_cache_that_cannot_be_written_is_named(bases, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPLOYFA_CACHE", str(tmp_path / "file"))
    adapter = checkpoint(bases["three"], tmp_path / "p", VeFAConfig(target_modules=TARGETS))
    with pytest.raises(StorageError, match="DEPLOYFA_CACHE"):
        export(adapter, tmp_path / "b", optimize="none")


def test_the_bundle_says_which_base(bases, tmp_path) -> None:
    adapter = checkpoint(bases["three"], tmp_path / "p", VeFAConfig(target_modules=TARGETS))
    export(adapter, tmp_path / "b", optimize="none")
    reference = Bundle.open(tmp_path / "b").manifest.base
    assert reference.name == str(bases["three"].resolve()) and reference.fingerprint
