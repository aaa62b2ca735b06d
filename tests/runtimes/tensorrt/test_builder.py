"""Engines of real graphs, built without a GPU; an engine holds the weights of its graph as they are."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES

from deployfa.adapter import Adapter
from deployfa.base_graphs import base_graph
from deployfa.graph.storage import load_graph, save_graph
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.tensorrt import BuildRequest, Built, Sizes, build_engine
from deployfa.runtimes.tensorrt.profiles import dimensions
from deployfa.training.base_graph import export_module

from .small import small_request, weights


def engine_of(model: ir.Model, folder: Path, profile: dict[str, Sizes], **options: Any) -> tuple[Built, bytes]:
    graph = save_graph(model, folder)
    inputs = list(OnnxRuntimeRunner(graph, spinning=False).inputs)
    request = BuildRequest(target="tensorrt-rtx", graph=str(graph), inputs=inputs, profile=profile, **options)
    built = build_engine(request, folder / "engine")
    content = (folder / "engine").read_bytes()
    assert len(content) == built.bytes
    return built, content


def stored(model: ir.Model, *, axes: int) -> list[bytes]:
    """The first numbers of every float32 weight of so many axes."""
    arrays = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value is not None]
    found = [np.ascontiguousarray(a) for a in arrays if a.dtype == np.float32 and a.ndim == axes and a.size >= 16]
    return [array.tobytes()[:64] for array in found]


def share_within(model: ir.Model, content: bytes, *, axes: int = 2) -> float:
    """Of the weights of ``model``, how many an engine holds as they are."""
    wanted = stored(model, axes=axes)
    assert len(wanted) > 4
    return sum(start in content for start in wanted) / len(wanted)


@pytest.fixture(scope="module")
def gpt2() -> dict[str, ir.Model]:
    """``prefill`` and ``decode``, as transformers exports them."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    torch.manual_seed(0)
    small = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**small, bos_token_id=99, eos_token_id=99)).eval()
    ids = torch.randint(0, 99, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = OnnxExporter().export_for_generation(
            model, {"input_ids": ids, "attention_mask": mask}, OnnxConfig(dynamic=True), multi_token_decode=True
        )
    return {name: component.program for name, component in exported.components.items()}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_gpt2(gpt2: dict[str, ir.Model], phase: str, tmp_path: Path) -> None:
    graph = save_graph(gpt2[phase], tmp_path)
    inputs = {spec.name: spec for spec in OnnxRuntimeRunner(graph, spinning=False).inputs}
    batch, tokens = inputs["input_ids"].shape
    _, seen = inputs["attention_mask"].shape
    # the exporter does not say that the mask covers past and present
    sizes = {batch: Sizes(1, 2, 4), tokens: Sizes(1, 1, 8), seen: Sizes(2, 17, 24)}
    if phase == "decode":
        sizes[inputs["input.past_key_values.layers.0.keys"].shape[2]] = Sizes(1, 16, 16)
    else:
        sizes[seen] = sizes[tokens]
    assert set(dimensions(list(inputs.values()))) == set(sizes)
    profile = {str(name): size for name, size in sizes.items()}
    built, content = engine_of(gpt2[phase], tmp_path, profile, compute_capabilities=["8.9"])
    assert built.layer_types["float"] > 50
    assert share_within(gpt2[phase], content) == 1


@pytest.mark.parametrize(
    ("name", "axes", "least"),
    # the three channels of an image are padded to four: one tensor of 49
    [("ViT", 2, 1.0), ("EfficientNet-Lite0 (real weights)", 4, 48 / 49)],
)
def test_pictures(name: str, axes: int, least: float, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    model = export_module(architecture.model(), architecture.feeds(2), architecture.dynamic)
    built, content = engine_of(model, tmp_path, {"batch": Sizes(1, 2, 8)}, compute_capabilities=["8.9"])
    assert built.compute_capabilities == ["8.9"]
    assert share_within(model, content, axes=axes) >= least
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 2)
    assert share_within(model, content, axes=axes) < 0.05, "the check sees other weights"


def test_the_minilm_base(trained: dict[str, Path], tmp_path: Path) -> None:
    model = base_graph(Adapter.load(trained["head"])).load()
    profile = {"batch": Sizes(1, 4, 16), "sequence": Sizes(1, 128, 512)}
    built, content = engine_of(model, tmp_path, profile)
    assert built.compute_capabilities == ["8.0", "8.6", "8.9", "12.0", "12.1"]
    assert share_within(model, content) == 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("plain")
    build_engine(small_request(folder), folder / "engine")
    return (folder / "engine").read_bytes()


def test_the_same_request_builds_the_same_engine(plain: bytes, tmp_path: Path) -> None:
    build_engine(small_request(tmp_path), tmp_path / "engine")
    assert (tmp_path / "engine").read_bytes() == plain
    assert weights()["w"].tobytes() in plain


@pytest.mark.parametrize(
    "options",
    [
        {"tf32": True},
        {"compute_capabilities": ["8.6"]},
        {"compute_capabilities": ["8.6", "8.9"]},
        {"workspace_bytes": 2**30},
        {"profile": {"batch": Sizes(1, 1, 4)}},
        {"profile": {"batch": Sizes(1, 2, 8)}},
        {"profile": {"batch": Sizes(2, 2, 4)}},
    ],
    ids=str,
)
def test_every_option_reaches_the_builder(options: dict[str, Any], plain: bytes, tmp_path: Path) -> None:
    build_engine(small_request(tmp_path, **options), tmp_path / "engine")
    assert (tmp_path / "engine").read_bytes() != plain


def test_a_capability_named_twice_counts_once(plain: bytes, tmp_path: Path) -> None:
    built = build_engine(small_request(tmp_path, compute_capabilities=["8.9", "8.9"]), tmp_path / "engine")
    assert built.compute_capabilities == ["8.9"]
    assert (tmp_path / "engine").read_bytes() == plain


def test_a_graph_of_fixed_sizes_needs_no_profile(tmp_path: Path) -> None:
    request = small_request(tmp_path)
    model = load_graph(Path(request.graph)).clone()
    model.graph.inputs[0].shape = ir.Shape([2, 8])
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    built, _ = engine_of(model, fixed, {})
    assert built.layer_types == {"float": 3}


def test_what_it_says_of_itself_is_so(tmp_path: Path) -> None:
    from deployfa.runtimes.tensorrt import load_library

    begin = time.monotonic()
    built = build_engine(small_request(tmp_path), tmp_path / "engine")
    assert 0 < built.seconds <= time.monotonic() - begin
    assert built.library_version == load_library("tensorrt-rtx").version
    assert built.layer_types == {"float": 3}, "the weight, the product, the Relu"
