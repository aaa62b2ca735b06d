"""Tiny decoders trained for real: they get better at what they read, resume bit for bit, and say what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import transformers

from deployfa.adapter import Adapter
from deployfa.data import Row, read_language
from deployfa.errors import DataError, InputError
from deployfa.models import load_recipe
from deployfa.preprocess.sentences import SENTENCES
from deployfa.train import TrainReport, train
from deployfa.training.base import base_fingerprint, load_base
from deployfa.training.language_examples import LanguageExamples
from deployfa.training.preprocessing import generation_of
from deployfa.training.reference import load_adapted

from .tiny_decoders import KINDS, write_decoder

RATES = {"vefa": 0.02, "lorfa": 0.02, "lora": 0.02, "full": 0.003, "head": 0.01}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_decoder(tmp_path_factory.mktemp("base") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same sentences as texts, as prompts with completions, and as one text."""
    folder = tmp_path_factory.mktemp("files")
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in SENTENCES[:12]]
    rows = {
        "texts.jsonl": [{"text": text} for text in SENTENCES[:12]],
        "prompts.jsonl": [{"prompt": first, "completion": second} for first, second in halves],
    }
    for name, found in rows.items():
        (folder / name).write_text("\n".join(map(json.dumps, found)), encoding="utf-8")
    (folder / "book.txt").write_text("\n".join(SENTENCES[:12]), encoding="utf-8")
    return {path.name: path for path in folder.iterdir()}


def fitted(base: Path, kind: str, file: Path, out: Path, *, method: str = "vefa", **more: Any) -> TrainReport:
    options = {"learning_rate": RATES[method], "epochs": 4, "batch_size": 4, "sites": load_recipe(kind).sites}
    arguments = {name: more.pop(name) for name in ("resume", "progress", "force") if name in more}
    return train(
        model=base,
        task="text-generation",
        train_file=file,
        eval_file=file,
        shifted_files={},
        out=out,
        options={**options, "method": method, **more},
        **arguments,
    )


def scored(base: Path, file: Path, adapter: Path | None = None) -> float:
    """The perplexity of ``base``, as it lies on disk, with ``adapter`` attached by hooks."""
    loaded = load_base(base, "text-generation", labels=None)
    model = loaded.model
    if adapter is not None:
        model = load_adapted(loaded, Adapter.load(adapter), dtype=next(model.parameters()).dtype)
    examples = LanguageExamples(base, generation_of(loaded), max_length=96)
    found = examples.score(model, read_language(file), label="", progress=None).perplexity
    assert found is not None
    return found


@pytest.mark.parametrize("method", ["vefa", "lorfa", "lora"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_adapter_lowers_the_perplexity_of_what_it_read(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path, kind: str, method: str
) -> None:
    """Both figures of the report are those of the files: the base as it was, and the base with what was saved."""
    file = files["prompts.jsonl" if kind == "llama" else "texts.jsonl"]
    report = fitted(bases[kind], kind, file, tmp_path / "a.safetensors", method=method)
    found = report.perplexities["eval"]
    assert found.perplexity is not None and found.base is not None
    assert found.perplexity < 0.9 * found.base
    assert found.base == pytest.approx(scored(bases[kind], file), rel=1e-6)
    assert found.perplexity == pytest.approx(scored(bases[kind], file, tmp_path / "a.safetensors"), rel=1e-5)
    assert (report.labels, report.scores, report.train_rows) == ([], {}, 12)
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert (adapter.method, adapter.base.task, adapter.labels) == (method, "text-generation", ())
    assert adapter.modules == {}
    assert len(adapter.edits) == {"llama": 14, "gpt2": 8}[kind]
    assert adapter.base.fingerprint == base_fingerprint(load_base(bases[kind], "text-generation", labels=None).model)
    assert adapter.training["scores"]["eval"] == msgspec.to_builtins(found)


def test_the_whole_model_can_be_trained(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has no base to switch back to; and it is the directory that is as good as the report says."""
    capfd.readouterr()
    report = fitted(bases["llama"], "llama", files["book.txt"], tmp_path / "full", method="full", max_length=96)
    assert capfd.readouterr() == ("", ""), "libraries draw no bars of their own"
    found = report.perplexities["eval"]
    assert found.perplexity is not None and found.base is None
    assert found.perplexity < 0.7 * scored(bases["llama"], files["book.txt"])
    assert found.perplexity == pytest.approx(scored(tmp_path / "full", files["book.txt"]), rel=1e-5)


def test_a_book_is_trained_on_in_pieces(bases: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    """The model has 96 positions; more than that are asked for, and the book has more."""
    report = fitted(bases["gpt2"], "gpt2", files["book.txt"], tmp_path / "a.pt", max_length=10_000)
    shorter = fitted(bases["gpt2"], "gpt2", files["book.txt"], tmp_path / "b.pt", max_length=16)
    found, cut = report.perplexities["eval"], shorter.perplexities["eval"]
    assert found.tokens == cut.tokens > 96
    assert found.base == pytest.approx(scored(bases["gpt2"], files["book.txt"]), rel=1e-6)
    assert cut.base != found.base
    assert Adapter.load(tmp_path / "a.pt").training["options"]["max_length"] == 96


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_head_of_its_own_leaves_nothing_to_train(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    with pytest.raises(InputError, match=r"brings its own head.*use vefa"):
        fitted(bases[kind], kind, files["texts.jsonl"], tmp_path / "a.pt", method="head")
    assert list(tmp_path.iterdir()) == []


class Killed(Exception):
    pass


def _same(first: Path, second: Path) -> bool:
    a, b = Adapter.load(first).tensors(), Adapter.load(second).tensors()
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_resumed_it_is_the_same_adapter_bit_for_bit(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    base, file = bases["llama"], files["prompts.jsonl"]
    whole, out = tmp_path / "whole.pt", tmp_path / "killed.pt"
    wanted = fitted(base, "llama", file, whole, seed=1).perplexities
    steps: list[int] = []

    def kill(what: str, done: int, total: int) -> None:
        steps.append(done)
        if done == 8:  # of 12, in the third epoch
            raise Killed

    with pytest.raises(Killed):
        fitted(base, "llama", file, out, seed=1, progress=kill)
    work = out.with_name("killed.pt.work")
    assert sorted(path.name for path in work.glob("checkpoint-*")) == ["checkpoint-6"]
    with pytest.raises(InputError, match="another learning-rate"):
        fitted(base, "llama", file, out, seed=1, resume=True, learning_rate=0.5)
    steps.clear()
    found = fitted(
        base, "llama", file, out, seed=1, resume=True, progress=lambda what, done, _: steps.append(done)
    ).perplexities
    assert steps[0] == 7, "it went on, it did not begin anew"
    assert _same(whole, out)
    assert found == wanted
    assert not work.exists()
    fitted(base, "llama", file, tmp_path / "other.pt", seed=2)
    assert not _same(whole, tmp_path / "other.pt")


def test_a_training_that_diverges_writes_nothing(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"went to NaN or infinity .*lower --lr than 1e\+30"):
        fitted(bases["gpt2"], "gpt2", files["texts.jsonl"], tmp_path / "a.pt", learning_rate=1e30)
    assert not (tmp_path / "a.pt").exists()


def test_a_recipe_for_another_kind_of_model(bases: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"GPT2LMHeadModel has no layer .*q_proj.*pass the --recipe of its kind"):
        fitted(bases["gpt2"], "llama", files["texts.jsonl"], tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_words_than_the_model(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """Words added to it, and embeddings not resized."""
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(base))
    words = len(tokenizer)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(base)
    assert fitted(base, "gpt2", files["texts.jsonl"], tmp_path / "a.pt").perplexities
    rows = tmp_path / "zebra.jsonl"
    rows.write_text('{"text": "a zebra here"}')
    with pytest.raises(DataError, match=rf"makes token {words} of the rows, and the model knows {words} from 0 on"):
        fitted(base, "gpt2", rows, tmp_path / "b.pt")


def test_a_model_that_sees_what_comes_is_no_decoder(
    bases: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    """transformers loads BERT as a decoder, which reads the answer before it gives it."""
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))
    transformers.BertForMaskedLM(config).save_pretrained(base)
    with pytest.raises(InputError, match="BertLMHeadModel sees what comes after a token"):
        fitted(base, "gpt2", files["texts.jsonl"], tmp_path / "a.pt", sites="all-linear")


def test_what_was_not_begun_leaves_nothing_behind(bases: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(InputError, match="max-length is 1"):
        fitted(bases["gpt2"], "gpt2", file, tmp_path / "a.pt", max_length=1)
    file.write_text('{"prompt": "a", "completion": ""}')
    with pytest.raises(DataError, match="line 1 has an empty completion"):
        fitted(bases["gpt2"], "gpt2", file, tmp_path / "a.pt")
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        file.write_text('{"prompt": "a", "completion": "b"}')
        fitted(tmp_path / "no-model", "gpt2", file, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == [file]


def test_rows_of_no_file_can_be_scored(bases: dict[str, Path]) -> None:
    """Other numbers for other rows: the figure is of what was passed."""
    base = load_base(bases["llama"], "text-generation", labels=None)
    examples = LanguageExamples(bases["llama"], generation_of(base), max_length=96)
    first, second = (
        examples.score(base.model, [Row(text)], label="", progress=None).perplexity for text in SENTENCES[:2]
    )
    assert first != second
