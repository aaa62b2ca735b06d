"""Language models on the command line: train, verify, and what they say of wrong input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import msgspec
import numpy as np
import pytest

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.bundle.bundle import sha256_file, write_manifest
from deployfa.cli import main
from deployfa.parity import ParityReport
from deployfa.pipeline import export
from deployfa.preprocess.sentences import SENTENCES
from deployfa.train import TrainReport

from ..training.tiny_decoders import random_vefa, write_decoder
from .test_bad_input import assert_one_line
from .test_json import check

Finished = CompletedProcess[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("base") / "gpt2", "gpt2")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """``cli`` in this process, where PyTorch is already imported."""

    def run(*arguments: object) -> Finished:
        command = ["deployfa", *map(str, arguments)]
        monkeypatch.setattr("sys.argv", command)
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        return Finished(command, int(done.value.code or 0), *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": text[:9], "completion": text[9:]} for text in SENTENCES[4:12]]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_train_says_perplexities(cli, here, base: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"The film was a joy.\r\nThe battery is dreadful!\r\n")
    command = ["train", "--recipe", "gpt2", "-m", base, "--train", prompts, "--eval", prompts, "--lr", "0.02"]
    command += ["--epochs", "2", "--batch-size", "4"]
    result = cli(*command, "--ood", f"book={tmp_path / 'book.txt'}", "-o", tmp_path / "a.pt", "--json")
    assert result.returncode == 0, result.stderr
    check(result.stdout, TrainReport)
    report = msgspec.json.decode(result.stdout, type=TrainReport)
    assert (report.labels, report.scores) == ([], {})
    assert list(report.perplexities) == ["eval", "book"]
    found = report.perplexities["eval"]
    assert found.perplexity is not None and found.base is not None and found.perplexity < found.base
    assert Adapter.load(tmp_path / "a.pt").base.task == "text-generation"
    shown = here(*command, "-o", tmp_path / "b.pt", "--task", "text-generation")
    assert shown.returncode == 0, shown.stderr
    # the same seed: the same figures, as a person reads them
    change = 100 * (found.perplexity / found.base - 1)
    text = shown.stdout + shown.stderr
    for figure in (f"{found.tokens:,}", f"{found.perplexity:.2f}", f"{found.base:.2f}", f"{change:+.1f}"):
        assert figure in text
    assert "accuracy" not in text


def test_verify_judges_the_perplexity_of_rows_of_ones_own(here, base: Path, tmp_path: Path) -> None:
    bundle = export(random_vefa(base), tmp_path / "a.bundle", optimize="none").bundle
    data = tmp_path / "book.txt"
    data.write_text(" ".join(SENTENCES[:6]) + "\nThe end.", encoding="utf-8")
    result = here("verify", bundle.path, "--data", data, "--json")
    assert result.returncode == 0, result.stderr
    check(result.stdout, ParityReport)
    report = msgspec.json.decode(result.stdout, type=ParityReport)
    assert report.passed and report.perplexity is not None and report.perplexity.tokens > 96
    shorter = here("verify", bundle.path, "--data", data, "--max-rows", "1", "--json")
    judged = msgspec.json.decode(shorter.stdout, type=ParityReport).perplexity
    assert judged is not None and judged.tokens < report.perplexity.tokens
    # the 65th position and those after it: the reference in the bundle does not reach there
    copy = Path(shutil.copytree(bundle.path, tmp_path / "b.bundle"))
    weights = bytearray((copy / "model.onnx.data").read_bytes())
    positions = np.load(_positions(base, tmp_path))
    start = bytes(weights).index(positions[64:].tobytes())
    weights[start : start + positions[64:].nbytes] = (-positions[64:]).tobytes()
    (copy / "model.onnx.data").write_bytes(weights)
    files = {name: sha256_file(copy / name) for name in bundle.manifest.files}
    write_manifest(copy, msgspec.structs.replace(bundle.manifest, files=files))
    result = here("verify", copy, "--data", data)
    assert result.returncode == 1
    assert "FAIL: the perplexity of the bundle differs from PyTorch's by" in " ".join(result.stdout.split())
    manifest = Bundle.open(copy).manifest
    assert manifest.parity is not None and manifest.parity["passed"] is False


def _positions(base: Path, folder: Path) -> Path:
    """The table of positions, from the checkpoint."""
    from safetensors.numpy import load_file

    weights = load_file(base / "model.safetensors")
    np.save(folder / "wpe.npy", next(array for name, array in weights.items() if name.endswith("wpe.weight")))
    return folder / "wpe.npy"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", b"prompt,completion\nok,ok\nIs it?,\n", ("a.csv' line 3", "an empty completion", "fill it in")),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "a"}', ("a.jsonl' line 2", "has no text")),
        ("a.txt", b"ok\ncaf\xe9", ("a.txt' is not UTF-8 at line 2",)),
        ("a.md", b"ok", ("a.md' is neither .txt, .csv nor .jsonl",)),
    ],
)
def test_a_wrong_row_is_named_before_anything_is_loaded(
    cli, tmp_path: Path, name: str, content: bytes, parts: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    command = ["train", "--task", "text-generation", "-m", tmp_path / "no-model", "--train", tmp_path / name]
    assert_one_line(cli(*command, "-o", tmp_path / "a.pt"), *parts)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_wrong_row_of_another_domain_too(here, base: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("text\nok\n \n")
    command = ["train", "--recipe", "gpt2", "-m", base, "--train", prompts, "-o", tmp_path / "a.pt"]
    assert_one_line(here(*command, "--ood", f"other={tmp_path / 'other.csv'}"), "other.csv' line 3 has an empty text")


def test_requests_that_cannot_be(here, base: Path, prompts: Path, tmp_path: Path) -> None:
    common = ["train", "--train", prompts, "-o", tmp_path / "a.pt"]
    wrong_task = here(*common, "--recipe", "llama", "--task", "text-classification", "-m", base)
    assert_one_line(wrong_task, "recipe 'llama' is for text-generation", "leave --task out")
    assert_one_line(here(*common, "--task", "text-generation"), "no base model", "--model")
    assert_one_line(here(*common, "--task", "poetry", "-m", base), "unknown task 'poetry'", "text-generation")
    assert_one_line(here(*common, "--recipe", "gpt2"), "no base model")
    assert_one_line(
        here(*common, "--recipe", "gpt2", "-m", base, "--method", "head"), "brings its own head", "use vefa"
    )
    assert_one_line(here(*common, "--recipe", "gpt2", "-m", base, "--max-length", "1"), "max-length is 1")
    assert list(tmp_path.iterdir()) == []
