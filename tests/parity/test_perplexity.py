"""The perplexity of a bundle: against its definition in float64, and seen when it is off."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
from tokenizers import Tokenizer

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.bundle.bundle import sha256_file, write_manifest
from deployfa.data import Row
from deployfa.delta import export_delta
from deployfa.errors import DataError, InputError
from deployfa.graph.storage import load_graph
from deployfa.pack import pack
from deployfa.parity import ParityReport, verify
from deployfa.parity import perplexity as module
from deployfa.parity.other import Other
from deployfa.parity.perplexity import LIMIT, bundle_perplexity, of_pieces
from deployfa.parity.report import PerplexityParity
from deployfa.parity.table import render
from deployfa.parity.verify import _with_perplexity
from deployfa.pipeline import export
from deployfa.preprocess.sentences import SENTENCES
from deployfa.slots import export_slots
from deployfa.training.base import load_base
from deployfa.training.reference import float64_throughout, load_adapted

from ..training.tiny_decoders import random_vefa, write_decoder

#: The model has 96 positions: the last is cut, and the one before reaches where no row of the reference does.
ROWS = [
    Row("ok"),
    Row(SENTENCES[0]),
    Row("Is the film good?", completion=" It was a joy."),
    Row(" ".join(SENTENCES[:3])[:250]),
    Row(" ".join(SENTENCES[:8])),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("base") / "gpt2", "gpt2")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Adapter:
    return random_vefa(base)


@pytest.fixture(scope="module")
def bundle(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(adapter, tmp_path_factory.mktemp("bundle") / "a.bundle", optimize="none").bundle


@pytest.fixture(scope="module")
def report(bundle: Bundle) -> ParityReport:
    return verify(bundle, rows=ROWS)


@pytest.fixture(scope="module")
def by_hand(base: Path, adapter: Adapter) -> Callable[[list[Row]], tuple[float, int]]:
    """Cross entropy in float64 of one token after the other, the adapter unfolded; nothing is padded or batched."""
    with float64_throughout():
        model: Any = load_adapted(load_base(base, "text-generation", labels=None), adapter, dtype=torch.float64)
    tokenizer: Any = Tokenizer.from_file(str(base / "tokenizer.json"))

    def loss(read: list[int], token: int) -> float:
        with torch.inference_mode(), float64_throughout():
            logits = model(input_ids=torch.tensor([read])).logits[0, -1:]
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor([token])))

    def perplexity(rows: list[Row]) -> tuple[float, int]:
        losses = []
        for row in rows:
            first = tokenizer.encode(row.text).ids
            whole = [*first, *(tokenizer.encode(row.completion).ids if row.completion else []), 0]
            cut = 0
            for place in range(len(first) if row.completion else 1, len(whole)):
                cut = place - 1 if place - cut == 96 else cut
                losses.append(loss(whole[cut:place], whole[place]))
        return math.exp(math.fsum(losses) / len(losses)), len(losses)

    return perplexity


def test_it_is_what_its_definition_says(
    bundle: Bundle, report: ParityReport, by_hand: Callable[[list[Row]], tuple[float, int]]
) -> None:
    assert report.passed, report.reason
    found = report.perplexity
    assert found is not None and found.difference is not None
    wanted, tokens = by_hand(ROWS)
    assert found.tokens == tokens > 200
    assert found.truth == pytest.approx(wanted, rel=1e-5)
    assert found.deployed == pytest.approx(wanted, rel=1e-5)
    assert abs(found.difference) < 1e-5
    # a row less is another number
    assert load_perplexity(bundle, ROWS[1:]) != pytest.approx(wanted, rel=1e-3)


def load_perplexity(bundle: Bundle, rows: list[Row]) -> float:
    found = bundle_perplexity(bundle, of_pieces(bundle, rows), rows=len(rows)).perplexity
    assert found is not None
    return found


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_each_kind_of_row(bundle: Bundle, by_hand: Callable[[list[Row]], tuple[float, int]], row: int) -> None:
    assert load_perplexity(bundle, [ROWS[row]]) == pytest.approx(by_hand([ROWS[row]])[0], rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_batches_and_padding_on_the_left_change_nothing(
    bundle: Bundle, report: ParityReport, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(module, "_TOKENS", tokens)
    assert report.perplexity is not None
    assert load_perplexity(bundle, ROWS) == pytest.approx(report.perplexity.deployed, rel=1e-6)


def test_padding_that_is_not_masked_would_be_seen(
    bundle: Bundle, report: ParityReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask of ones the padding is read."""
    feeds = module.PromptPreprocessor.feeds

    def unmasked(self: Any, rows: Any, **more: Any) -> Any:
        found = feeds(self, rows, **more)
        return {**found, "attention_mask": np.ones_like(found["attention_mask"])}

    monkeypatch.setattr(module.PromptPreprocessor, "feeds", unmasked)
    monkeypatch.setattr(module, "_TOKENS", 10_000)
    assert report.perplexity is not None and report.perplexity.deployed is not None
    assert abs(load_perplexity(bundle, ROWS) / report.perplexity.deployed - 1) > LIMIT


def broken(bundle: Bundle, folder: Path, by: float) -> Path:
    """A copy whose positions from 64 on, where no row of the reference reaches, are moved ``by``; the manifest vouches
    for it."""
    shutil.copytree(bundle.path, folder)
    model = load_graph(folder / "model.onnx")
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    value = model.graph.initializers["transformer.wpe.weight"]
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    array[64:, 0] += by
    value.const_value = ir.tensor(array, name=value.name)
    (folder / "model.onnx.data").unlink()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    files = {name: sha256_file(folder / name) for name in bundle.manifest.files}
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, files=files))
    return folder


def test_a_bundle_that_only_its_perplexity_gives_away(bundle: Bundle, tmp_path: Path) -> None:
    """Wrong from the 65th position on: no case of the reference is as long."""
    copy = Bundle.open(broken(bundle, tmp_path / "b.bundle", 1.0))
    found = verify(copy, rows=ROWS)
    assert not found.passed
    assert all(stage.passed for stage in found.stages)
    assert found.perplexity is not None and found.perplexity.difference is not None
    assert abs(found.perplexity.difference) > LIMIT
    assert "the perplexity of the bundle differs from PyTorch's by" in found.reason
    assert "the limit is 0.1 %" in found.reason
    table = " ".join(str(part) for part in render(found))
    assert "FAIL: the perplexity" in table and f"perplexity of {found.perplexity.tokens:,} tokens" in table
    # rows that do not reach there do not show it
    assert verify(copy, rows=ROWS[:3]).passed
    assert load_perplexity(bundle, ROWS[:3]) == load_perplexity(copy, ROWS[:3])


@pytest.mark.parametrize(
    ("difference", "passed"),
    [(0.0009, True), (-0.0009, True), (0.0011, False), (-0.0011, False), (None, False)],
)
def test_a_tenth_of_a_percent_in_either_direction(report: ParityReport, difference: float | None, passed: bool) -> None:
    figures = {"truth": 2.0, "deployed": None if difference is None else 2.0 * (1 + difference)}
    parity = PerplexityParity(tokens=9, difference=difference, limit=LIMIT, **figures)
    found = _with_perplexity(report, parity)
    assert found.passed is passed
    assert ("perplexity" in found.reason) is not passed
    assert msgspec.json.decode(msgspec.json.encode(found), type=ParityReport) == found
    assert render(found)
    # what failed before says why by itself
    failed = msgspec.structs.replace(report, passed=False, reason="another")
    assert _with_perplexity(failed, parity).reason == "another"


def test_a_bundle_that_answers_nan_fails_and_its_report_is_json(bundle: Bundle, tmp_path: Path) -> None:
    found = verify(Bundle.open(broken(bundle, tmp_path / "b.bundle", math.nan)), rows=ROWS)
    assert not found.passed
    assert "no finite number" in found.reason
    assert found.perplexity is not None
    assert (found.perplexity.deployed, found.perplexity.difference) == (None, None)
    assert msgspec.json.decode(msgspec.json.encode(found), type=ParityReport) == found


def test_slots_a_patch_and_a_pack(base: Path, adapter: Adapter, report: ParityReport, tmp_path: Path) -> None:
    """The adapter that is active is the one that is judged."""
    assert report.perplexity is not None
    slots = export_slots(adapter, tmp_path / "slots.bundle", optimize="none").bundle
    assert load_perplexity(slots, ROWS) == pytest.approx(report.perplexity.deployed, rel=1e-5)
    second = random_vefa(base, seed=1)
    with pytest.raises(InputError, match="of another adapter is measured in a bundle of its own"):
        verify(slots, rows=ROWS, other=Other("second", second, (), second.base))
    delta = export_delta(second, tmp_path / "fleet.bundle", tmp_path / "second.patch", optimize="none")
    patched = verify(Bundle.open(delta.bundle.path, patch=tmp_path / "second.patch"), adapter=second, rows=ROWS)
    assert patched.passed, patched.reason
    assert patched.perplexity is not None
    assert patched.perplexity.truth != pytest.approx(report.perplexity.truth, rel=0.01)
    packed = pack({"one": adapter, "two": second}, tmp_path / "pack.bundle", table_inputs=True).bundle
    with pytest.raises(InputError, match="is a pack"):
        load_perplexity(packed, ROWS)


def test_nothing_to_judge_by(bundle: Bundle) -> None:
    settings = bundle.manifest.preprocessing
    assert settings.generation is not None
    endless = msgspec.structs.replace(
        bundle.manifest,
        preprocessing=msgspec.structs.replace(
            settings, generation=msgspec.structs.replace(settings.generation, eos_token_ids=[])
        ),
    )
    with pytest.raises(DataError, match="one token each"):
        of_pieces(Bundle(bundle.path, endless), [Row("a")])
