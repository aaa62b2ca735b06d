"""Training on the real MiniLM: deterministic, resumable, and what lands in the adapter file."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from deployfa.adapter import Adapter
from deployfa.errors import DataError, InputError, StorageError
from deployfa.models import load_recipe
from deployfa.train import _same_request, train
from deployfa.training.fit import _last_checkpoint
from deployfa.training.options import FitOptions

SITES = load_recipe("minilm").sites


def _train(out: Path, data: dict[str, Path], model: Path, **options: Any):
    chosen = {"method": "vefa", "learning_rate": 0.01, "epochs": 1, "batch_size": 16, "sites": SITES, **options}
    return train(
        model=model,
        task="text-classification",
        train_file=data["movies_train"],
        eval_file=None,
        shifted_files={},
        out=out,
        options=chosen,
    )


def _same(first: Path, second: Path) -> bool:
    a, b = Adapter.load(first).tensors(), Adapter.load(second).tensors()
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_the_adapter_file_carries_its_origin(trained: dict[str, Path]) -> None:
    adapter = Adapter.load(trained["vefa"])
    assert adapter.method == "vefa"
    assert len(adapter.edits) == 36
    assert adapter.parameters == 6 * (4 * 384 + 384 + 1536)
    assert set(adapter.modules) == {"classifier"}
    assert adapter.labels == ("negative", "positive")
    assert adapter.base.architecture == "BertForSequenceClassification"
    assert adapter.training["rows"] == 96
    assert set(adapter.training["scores"]) == {"eval", "tweets"}
    assert all(edit.distance() > 0 for edit in adapter.edits.values())


def test_every_method_names_the_same_base(trained: dict[str, Path]) -> None:
    prints = {Adapter.load(path).base.fingerprint for path in trained.values()}
    assert len(prints) == 1


def test_torch_reads_the_file_with_weights_only(trained: dict[str, Path]) -> None:
    content = torch.load(trained["vefa"], weights_only=True)
    ours = Adapter.load(trained["vefa"])
    assert content["meta"]["base"]["fingerprint"] == ours.base.fingerprint
    name, array = next(iter(ours.tensors().items()))
    assert np.array_equal(content["tensors"][name].numpy(), array)


@pytest.mark.slow
def test_one_seed_one_adapter(small_data: dict[str, Path], minilm_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("a.pt", 3), ("b.pt", 3), ("c.pt", 4)):
        _train(tmp_path / name, small_data, minilm_dir, seed=seed)
    assert _same(tmp_path / "a.pt", tmp_path / "b.pt")
    assert not _same(tmp_path / "a.pt", tmp_path / "c.pt")
    assert not list(tmp_path.glob("*.work")), "checkpoints are removed once the adapter is written"


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_same_adapter(
    small_data: dict[str, Path], minilm_dir: Path, tmp_path: Path
) -> None:
    _train(tmp_path / "whole.pt", small_data, minilm_dir, epochs=3, seed=1)
    out = tmp_path / "killed.pt"
    command = [sys.executable, "-m", "deployfa.cli", "train", "--recipe", "minilm", "--model", str(minilm_dir)]
    command += ["--train", str(small_data["movies_train"]), "--out", str(out), "--lr", "0.01", "--epochs", "3"]
    command += ["--batch-size", "16", "--seed", "1"]
    work = out.with_name("killed.pt.work")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(work.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(work.glob("checkpoint-*"))
    resumed = subprocess.run([*command, "--resume", "--json"], capture_output=True, check=False)
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert _same(tmp_path / "whole.pt", out)
    assert not work.exists()


@pytest.mark.slow
def test_bf16_trains_float32_adapters(small_data: dict[str, Path], minilm_dir: Path, tmp_path: Path) -> None:
    _train(tmp_path / "a.pt", small_data, minilm_dir, precision="bf16")
    adapter = Adapter.load(tmp_path / "a.pt")
    assert {array.dtype for edit in adapter.edits.values() for array in edit.tensors().values()} == {
        np.dtype("float32")
    }
    assert all(edit.distance() > 0 for edit in adapter.edits.values())


@pytest.mark.slow
def test_full_fine_tuning_writes_a_model_directory(
    small_data: dict[str, Path], minilm_dir: Path, tmp_path: Path
) -> None:
    report = _train(tmp_path / "full", small_data, minilm_dir, method="full", learning_rate=5e-5)
    assert report.trainable_parameters == 22_713_986
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in (tmp_path / "full").iterdir()}
    with pytest.raises(InputError, match="directory"):
        _train(tmp_path / "full.pt", small_data, minilm_dir, method="full")


def test_one_label_is_not_a_classifier(tmp_path: Path, minilm_dir: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\ngood,yes\nfine,yes\n")
    with pytest.raises(DataError, match="one label only"):
        _train(tmp_path / "a.pt", {"movies_train": tmp_path / "t.csv"}, minilm_dir)


@pytest.mark.parametrize("field", ["learning_rate", "epochs", "batch_size", "rank", "max_length"])
def test_hyperparameters_must_be_positive(field: str) -> None:
    values: dict[str, Any] = {"method": "vefa", "learning_rate": 1e-3, field: 0}
    with pytest.raises(InputError, match=field.replace("_", "-")):
        FitOptions(**values)


def test_asking_for_a_missing_gpu_is_an_error(small_data: dict[str, Path], minilm_dir: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="no CUDA device"):
        _train(tmp_path / "a.pt", small_data, minilm_dir, device="cuda")


def test_the_report_is_json(trained: dict[str, Path]) -> None:
    training = Adapter.load(trained["lora"]).training
    assert msgspec.json.decode(msgspec.json.encode(training)) == training


@pytest.mark.parametrize(
    "wrong", [{"epochs": float("inf")}, {"learning_rate": float("nan")}, {"alpha": 0.0}, {"seed": -1}, {"seed": 2**32}]
)
def test_hyperparameters_that_no_training_can_have(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=name.replace("_", "-")):
        FitOptions(**{"method": "vefa", "learning_rate": 1e-3, **wrong})


def test_only_a_whole_checkpoint_is_resumed(tmp_path: Path) -> None:
    """A kill while the Trainer writes one leaves a folder without its last file."""
    assert _last_checkpoint(tmp_path / "nothing") is None
    for step in (3, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert _last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text('{"epo')
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("{}")
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")


def test_another_request_is_not_resumed(tmp_path: Path) -> None:
    rows = tmp_path / "t.csv"
    rows.write_text("text,label\n")
    options = FitOptions(method="vefa", learning_rate=1e-3)
    _same_request(tmp_path, options, "model", rows)
    _same_request(tmp_path, options, "model", rows)
    with pytest.raises(InputError, match="another epochs"):
        _same_request(tmp_path, msgspec.structs.replace(options, epochs=9), "model", rows)
    with pytest.raises(InputError, match="another model"):
        _same_request(tmp_path, options, "other", rows)
    rows.write_text("text,label\nx,y\n")
    with pytest.raises(InputError, match="another rows"):
        _same_request(tmp_path, options, "model", rows)


def test_an_output_inside_a_file_is_refused_before_training(small_data: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is not a folder"):
        _train(tmp_path / "file" / "a.pt", small_data, tmp_path / "no-model")


def test_texts_longer_than_the_models_positions_are_cut(minilm_dir: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(minilm_dir).save_pretrained(tmp_path / "model")
    words = "\n".join(f"{'good film ' * 40},{label}" for label in ("yes", "no") * 8)
    (tmp_path / "t.csv").write_text(f"text,label\n{words}\n")
    _train(tmp_path / "a.pt", {"movies_train": tmp_path / "t.csv"}, tmp_path / "model", sites="all-linear")
    assert Adapter.load(tmp_path / "a.pt").training["options"]["max_length"] == 24


def test_a_head_that_is_there_keeps_the_order_of_its_labels(tmp_path: Path) -> None:
    import transformers

    from deployfa.training.base import label_order

    transformers.BertConfig(id2label={0: "positive", 1: "negative"}).save_pretrained(tmp_path)
    assert label_order(tmp_path, ["negative", "positive"]) == ["positive", "negative"]
    assert label_order(tmp_path, ["bad", "good"]) == ["bad", "good"]
    assert label_order(tmp_path / "nowhere", ["bad", "good"]) == ["bad", "good"]


@pytest.mark.slow
def test_training_pads_as_the_bundle_will(
    small_data: dict[str, Path], minilm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer says what fills up a row; a config that says otherwise (5) would pad another way in training."""
    import shutil

    from deployfa.training.text_examples import TextExamples

    model = Path(shutil.copytree(minilm_dir, tmp_path / "model"))
    config = msgspec.json.decode((model / "config.json").read_bytes())
    (model / "config.json").write_bytes(msgspec.json.encode({**config, "pad_token_id": 5}))
    seen: set[int] = set()
    original = TextExamples.collate

    def recorded(self: TextExamples, rows: Any) -> Any:
        batch = original(self, rows)
        seen.update(batch["input_ids"][batch["attention_mask"] == 0].tolist())
        return batch

    monkeypatch.setattr(TextExamples, "collate", recorded)
    _train(tmp_path / "a.pt", small_data, model)
    assert seen == {0}
