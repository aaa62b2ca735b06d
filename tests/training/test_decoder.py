"""One graph reads prompts and goes on from them, in every form of a bundle, and what is wrong in it is seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployfa.adapter import Adapter
from deployfa.base_graphs import base_graph
from deployfa.bundle import Bundle
from deployfa.errors import ExportError
from deployfa.graph.storage import load_graph
from deployfa.pack import pack
from deployfa.parity.cases import read_cases, write_cases
from deployfa.parity.verify import verify
from deployfa.pipeline import export
from deployfa.preprocess import PromptPreprocessor, open_preprocessor
from deployfa.preprocess.prompt import KEPT, cache_names
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.slots import export_slots
from deployfa.training.base import load_base
from deployfa.training.decoder import cache_of

from .tiny_decoders import KINDS, random_vefa, write_decoder

Made = tuple[Path, Adapter]


@pytest.fixture(scope="module", params=list(KINDS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = write_decoder(tmp_path_factory.mktemp(request.param) / "model", request.param)
    return folder, random_vefa(folder)


@pytest.fixture(scope="module")
def folded(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(made[1], tmp_path_factory.mktemp("folded") / "a.bundle", optimize="none").bundle


def test_the_signature_is_optimums(folded: Bundle) -> None:
    inputs = {spec.name: spec.shape for spec in folded.manifest.graph.inputs}
    outputs = {spec.name: spec.shape for spec in folded.manifest.graph.outputs}
    cache = folded.manifest.preprocessing.cache
    assert cache is not None
    past, total = ["batch", cache.heads, "past_sequence", 8], ["batch", cache.heads, "total_sequence", 8]
    assert inputs["input_ids"] == inputs["position_ids"] == ["batch", "sequence"]
    assert inputs["attention_mask"] == ["batch", "total_sequence"]
    assert inputs[KEPT] == ["kept"]
    assert [inputs[name] for name, _ in cache_names(cache)] == [past] * 4
    assert [outputs[name] for _, name in cache_names(cache)] == [total] * 4
    assert outputs["logits"][:2] == ["batch", "kept"]
    assert len(inputs) == 8
    assert len(outputs) == 5


def test_what_a_device_needs_is_in_the_manifest(folded: Bundle) -> None:
    settings = folded.manifest.preprocessing
    assert settings.kind == "prompt"
    assert settings.max_length == 96
    assert settings.generation is not None
    assert (settings.generation.eos_token_ids, settings.generation.pad_token_id) == ([0], 0)
    assert settings.generation.chat_template
    assert "chat_template.jinja" in folded.manifest.files
    assert folded.manifest.labels == []


def test_word_by_word_is_all_at_once(folded: Bundle) -> None:
    """The last logits of a prompt read in one go, and those after reading it token by token."""
    reader = open_preprocessor(folded.path, folded.manifest.preprocessing)
    assert isinstance(reader, PromptPreprocessor)
    runner = OnnxRuntimeRunner(folded.graph, threads=1)
    whole = reader.encode(["The film was a joy.", "ok"])
    wanted = runner.run(whole)["logits"][:, -1]
    caches: dict[str, Any] = {name: whole[name] for name, _ in cache_names(reader.cache)}
    for place in range(whole["input_ids"].shape[1]):
        step = {name: whole[name][:, place : place + 1] for name in ("input_ids", "position_ids")}
        step |= {"attention_mask": whole["attention_mask"][:, : place + 1], KEPT: np.array([0]), **caches}
        found = runner.run(step)
        caches = {past: found[present] for past, present in cache_names(reader.cache)}
    np.testing.assert_allclose(found["logits"][:, -1], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_prompts_are_padded_on_the_left(folded: Bundle) -> None:
    reader = open_preprocessor(folded.path, folded.manifest.preprocessing)
    feeds = reader.encode(["ok", "The film was a joy."], length=20)
    assert feeds["input_ids"].shape == (2, 20)
    assert feeds["attention_mask"][0].tolist() == [0] * 19 + [1]
    assert feeds["position_ids"][0].tolist() == [0] * 20
    assert feeds["position_ids"][1, -1] == feeds["attention_mask"][1].sum() - 1


@pytest.mark.parametrize("form", ["folded", "side op", "slots", "pack"])
def test_every_form_is_equal_to_pytorch(made: Made, form: str, tmp_path: Path) -> None:
    _, adapter = made
    out = tmp_path / "a.bundle"
    if form == "slots":
        bundle = export_slots(adapter, out, optimize="none").bundle
    elif form == "pack":
        bundle = pack({"one": adapter, "two": random_vefa(made[0], seed=1)}, out, table_inputs=True).bundle
    else:
        bundle = export(adapter, out, optimize="none", placement="auto" if form == "folded" else "side-op").bundle
    report = verify(bundle, use_torch=False)
    assert report.passed, report.reason
    assert report.effect > 0.05
    if form != "pack":
        report = verify(bundle, use_torch=True)
        assert report.passed, report.reason


def test_the_reference_has_caches_in_it(folded: Bundle) -> None:
    """One token after a cache, three tokens after a cache, and prompts."""
    sizes = {
        (case.feeds["input_ids"].shape[1], case.feeds["past_key_values.0.key"].shape[2])
        for case in read_cases(folded.reference)
    }
    assert {new for new, past in sizes if past} == {1, 3}
    assert any(past == 0 for _, past in sizes)


def test_a_cache_of_another_row_is_seen(folded: Bundle, tmp_path: Path) -> None:
    """Rows of a cache swapped: what decoding reads is part of what is verified."""
    import shutil

    import msgspec

    from deployfa.bundle.bundle import sha256_file, write_manifest

    copy = Path(shutil.copytree(folded.path, tmp_path / "b.bundle"))
    cases = read_cases(folded.reference)
    number = next(i for i, case in enumerate(cases) if case.feeds["past_key_values.0.key"].shape[2])
    feeds = dict(cases[number].feeds)
    feeds["past_key_values.1.value"] = feeds["past_key_values.1.value"][::-1]
    cases[number] = dataclasses.replace(cases[number], feeds=feeds)
    write_cases(copy / folded.reference.name, cases)
    manifest = folded.manifest
    files = {**manifest.files, folded.reference.name: sha256_file(copy / folded.reference.name)}
    write_manifest(copy, msgspec.structs.replace(manifest, files=files))
    assert not verify(Bundle.open(copy), use_torch=False).passed


def test_a_base_graph_that_forgets_is_not_written(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Positions counted from zero again after a cache: the check against PyTorch, which is made with one, fails."""
    from deployfa.training import base_graph as module

    original = module.export_base_graph

    def forgetful(base: Any) -> Any:
        graph = original(base)
        for value in graph.graph.inputs:
            if value.name == "past_key_values.0.value":
                other = next(each for each in graph.graph.inputs if each.name == "past_key_values.1.value")
                ones, others = list(value.uses()), list(other.uses())
                for node, index in ones:
                    node.replace_input_with(index, other)
                for node, index in others:
                    node.replace_input_with(index, value)
        return graph

    monkeypatch.setattr(module, "export_base_graph", forgetful)
    monkeypatch.setenv("DEPLOYFA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ExportError, match="differs from PyTorch"):
        base_graph(made[1])


def test_other_caches_are_refused() -> None:
    """A sliding window keeps something else than all keys and values."""
    import transformers as tf

    model = tf.MistralForCausalLM(
        tf.MistralConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=4,
        )
    ).eval()  # fmt: skip
    with pytest.raises(ExportError, match="only decoders with a plain cache"):
        cache_of(model)


def test_names_of_sites_survive(folded: Bundle, made: Made) -> None:
    paths = {node.metadata_props.get("pkg.torch.onnx.name_scopes", "") for node in load_graph(folded.graph).graph}
    assert all(any(site in path for path in paths) for site in made[1].edits)
    assert load_base(made[0], "text-generation", labels=None).model.training is False
    assert torch.is_grad_enabled()


def test_an_engine_reads_prompts_and_goes_on(folded: Bundle, tmp_path: Path) -> None:
    """Built, not run: that needs a GPU.  Its shapes begin at an empty cache."""
    import shutil

    from deployfa.compile import compile_bundle

    copy = Bundle.open(Path(shutil.copytree(folded.path, tmp_path / "b.bundle")))
    record = compile_bundle(copy, "tensorrt-rtx", precision="fp32").engine
    assert record.profile["past_sequence"].minimum == 0
    assert record.profile["total_sequence"].maximum == record.profile["sequence"].maximum == 96
    assert record.graph_error < record.error_limit


def test_serving_says_that_it_does_not_generate(folded: Bundle, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "deployfa.cli", "serve", str(folded.path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "deployfa run" in done.stderr
    assert "--prompt" in done.stderr


def test_a_pack_is_held_with_caches_too(made: Made, tmp_path: Path) -> None:
    """Rows of two adapters go on in one batch; the caches of one swapped with the other's are seen."""
    import shutil

    import msgspec

    from deployfa.bundle.bundle import sha256_file, write_manifest

    bundle = pack({"one": made[1], "two": random_vefa(made[0], seed=1)}, tmp_path / "a.bundle", optimize="none").bundle
    cases = read_cases(bundle.reference)
    going_on = [n for n, case in enumerate(cases) if case.feeds["past_key_values.0.key"].shape[2]]
    assert {cases[n].feeds["input_ids"].shape[1] for n in going_on} == {1, 3}
    assert all(set(cases[n].feeds["adapter_ids"].tolist()) == {1, 2} for n in going_on)
    assert verify(bundle, use_torch=False).passed
    copy = Path(shutil.copytree(bundle.path, tmp_path / "b.bundle"))
    case = cases[going_on[0]]
    feeds = {**case.feeds, "adapter_ids": 3 - case.feeds["adapter_ids"]}
    cases[going_on[0]] = dataclasses.replace(case, feeds=feeds)
    write_cases(copy / bundle.reference.name, cases)
    files = {**bundle.manifest.files, bundle.reference.name: sha256_file(copy / bundle.reference.name)}
    write_manifest(copy, msgspec.structs.replace(bundle.manifest, files=files))
    assert not verify(Bundle.open(copy), use_torch=False).passed


def test_another_end_is_another_base_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends an answer stands beside the weights: the cache must not keep the old one."""
    import json

    monkeypatch.setenv("DEPLOYFA_CACHE", str(tmp_path / "cache"))
    folder = write_decoder(tmp_path / "model", "gpt2")
    adapter = random_vefa(folder)
    assert base_graph(adapter).made_now
    assert not base_graph(adapter).made_now
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [0, 7]}))
    again = base_graph(adapter)
    assert again.made_now
    assert again.preprocessing.generation is not None
    assert again.preprocessing.generation.eos_token_ids == [0, 7]


def test_named_chat_templates_do_not_stop_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers as tf

    monkeypatch.setenv("DEPLOYFA_CACHE", str(tmp_path / "cache"))
    folder = write_decoder(tmp_path / "model", "gpt2")
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "x", "tool_use": "y"}
    tokenizer.save_pretrained(folder)
    assert base_graph(random_vefa(folder)).made_now


def test_a_long_text_is_cut_for_the_reference(made: Made, tmp_path: Path) -> None:
    from deployfa.data import Row
    from deployfa.pipeline import reference_preprocessor

    reader = reference_preprocessor(base_graph(made[1]))
    assert max(reader.lengths(["The film. " * 500])) <= 96
    rows = [Row("The film was a joy. " * 3), Row("ok")]
    assert export(made[1], tmp_path / "a.bundle", rows=rows, optimize="none").bundle.manifest.reference.rows > 2


@pytest.mark.parametrize("kind", list(KINDS))
def test_fusions_are_timed_within_what_a_small_model_knows(kind: str, tmp_path: Path) -> None:
    """400 words, 96 positions: the default shapes have 128."""
    adapter = random_vefa(write_decoder(tmp_path / "model", kind))
    tried = export(adapter, tmp_path / "a.bundle").bundle.manifest.optimization.tried
    assert [each.name for each in tried if each.median_ms][:1] == ["none"]
    assert len([each for each in tried if each.median_ms]) > 1
