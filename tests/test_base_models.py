"""Base models by name: converted once, and what is wrong is one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deployfa import base_models as module
from deployfa.base_models import BASE_MODELS, Converted, base_model
from deployfa.errors import InputError, MissingExtraError, StorageError
from deployfa.models import load_recipe, recipe_names


def test_every_recipe_that_brings_a_model_brings_one_that_is_known() -> None:
    brought = {recipe.asset for recipe in map(load_recipe, recipe_names()) if recipe.asset is not None}
    assert {"minilm", "smollm2"} <= brought <= set(BASE_MODELS)


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match=r"no base model is called 'smollm3'; known: .*minilm.*smollm2"):
        base_model("smollm3")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An asset that is in no index, in a cache of its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"weights")
    monkeypatch.setenv("DEPLOYFA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "fetch", lambda name, progress=None: folder)
    return folder


def copied(source: Path, out: Path) -> None:
    (out / "model").write_bytes((source / "a.gguf").read_bytes() * 2)


def with_function(monkeypatch: pytest.MonkeyPatch, function: str, **more: Any) -> None:
    monkeypatch.setitem(BASE_MODELS, "smollm2", Converted("smollm2-gguf", function, **more))


def test_it_is_converted_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def imported(name: str) -> Any:
        calls.append(name)
        return SimpleNamespace(convert=copied)

    monkeypatch.setattr(module, "import_module", imported)
    with_function(monkeypatch, "deployfa.training.gguf:convert")
    said: list[str] = []
    first = base_model("smollm2", progress=said.append)
    assert (first / "model").read_bytes() == b"weightsweights"
    assert said == ["converting smollm2 (once)"]
    assert base_model("smollm2") == first
    assert calls == ["deployfa.training.gguf"]
    # a function that writes something else does it again
    with_function(monkeypatch, "deployfa.training.gguf:convert", revision=2)
    assert base_model("smollm2") != first
    assert len(calls) == 2


def test_a_conversion_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """The real one, on a file that is no GGUF."""
    with pytest.raises(InputError, match=r"cannot read .*a\.gguf.*give a GGUF file"):
        base_model("smollm2")
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match="set DEPLOYFA_CACHE"):
        base_model("smollm2")


def test_without_pytorch(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(MissingExtraError, match="torch"):
        base_model("smollm2")


@pytest.mark.slow
def test_smollm2_is_the_model_that_the_index_has(tmp_path: Path) -> None:
    """The directory answers, bit for bit, what transformers reads from the file; and it knows English."""
    import transformers as tf

    from deployfa.assets import fetch
    from deployfa.data import Row
    from deployfa.preprocess import CHAT_TEMPLATE
    from deployfa.training.base import load_base, quiet
    from deployfa.training.language_examples import LanguageExamples
    from deployfa.training.preprocessing import generation_of
    from deployfa.training.tokenizer import save_tokenizer

    folder = base_model("smollm2")
    (file,) = fetch("smollm2-gguf").glob("*.gguf")
    base = load_base(folder, "text-generation", labels=None)
    model: Any = base.model
    assert (base.architecture, base.fresh_modules, base.max_length) == ("LlamaForCausalLM", (), 8192)
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with quiet(), torch.inference_mode():
        read = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
        np.testing.assert_array_equal(model(input_ids=ids).logits.numpy(), read(input_ids=ids).logits.numpy())
    del read
    save_tokenizer(folder, tmp_path)
    assert (tmp_path / CHAT_TEMPLATE).is_file()
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(str(folder))
    generation = generation_of(base)
    assert [tokenizer.decode([end]) for end in generation.eos_token_ids] == ["<|im_end|>"]
    examples = LanguageExamples(tmp_path, generation, max_length=128)
    text = "The capital of France is Paris, which lies on the river Seine, in the north of the country."
    scrambled = " ".join(sorted(text.split()))
    good, bad = (examples.score(model, [Row(each)], label="", progress=None).perplexity for each in (text, scrambled))
    assert good is not None and bad is not None
    assert good < 20 < bad / 5
