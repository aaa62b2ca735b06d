"""Engines of graphs, each built by the real library in its own process; no GPU is needed."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES

from deployfa.compile import _named, _signature
from deployfa.errors import RuntimeTargetError
from deployfa.graph.storage import load_graph, save_graph
from deployfa.runtimes.tensorrt import BuildRequest, Built, Sizes, build_engine
from deployfa.runtimes.tensorrt.profiles import dimensions

RTX = "tensorrt-rtx"


def build(model: ir.Model, folder: Path, **options: Any) -> tuple[Built, Path, list[float]]:
    """Every dynamic dimension from 1 to 8, tuned for 4."""
    inputs = _signature(model.graph.inputs)
    request = BuildRequest(
        target=RTX,
        graph=str(save_graph(model, folder)),
        inputs=inputs,
        nodes=_named(model),
        profile={name: Sizes(1, 4, 8) for name in dimensions(inputs)},
        **options,
    )
    shares: list[float] = []
    out = folder / "engine"
    return build_engine(request, out, shares.append), out, shares


def check(built: Built, out: Path, shares: list[float]) -> None:
    assert out.stat().st_size == built.bytes > 10_000
    assert built.layer_types["float"] > 10
    assert built.compute_capabilities == ["8.0", "8.6", "8.9", "12.0", "12.1"]
    assert shares == sorted(shares), "a bar that goes back is none"
    assert 0 < shares[0] < 0.5 and shares[-1] == 1.0


def exported(model: Any, feeds: dict[str, torch.Tensor], **options: Any) -> dict[str, ir.Model]:
    from transformers.exporters import OnnxConfig, OnnxExporter

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        found = OnnxExporter().export_for_generation(
            model, feeds, OnnxConfig(dynamic=True), multi_token_decode=True, **options
        )
    return {name: component.program for name, component in found.components.items()}


@pytest.fixture(scope="module")
def gpt2() -> dict[str, ir.Model]:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=99, eos_token_id=99
    )
    ids = torch.randint(0, 99, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return exported(tf.GPT2LMHeadModel(config).eval(), {"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_gpt2_generates(gpt2: dict[str, ir.Model], tmp_path: Path, part: str) -> None:
    model = gpt2[part].clone()
    names = [value.name for value in model.graph.inputs]
    assert any("past_key_values" in str(name) for name in names) is (part == "decode")
    check(*build(model, tmp_path))


@pytest.mark.parametrize("name", ["ViT", "EfficientNet-Lite0 (real weights)"])
def test_pictures(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    feeds = {key: torch.from_numpy(np.asarray(array)) for key, array in architecture.feeds(2).items()}
    dynamic = {
        key: {axis: torch.export.Dim(dim) for axis, dim in axes.items()} for key, axes in architecture.dynamic.items()
    }
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(architecture.model(), (), kwargs=feeds, dynamic_shapes=dynamic, dynamo=True)
    assert program is not None
    check(*build(program.model, tmp_path))


def unsupported() -> ir.Model:
    """``Unique`` answers as many numbers as there are, which an engine cannot know."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Unique", [x], num_outputs=1, name="odd")
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'encoder.pick', 'unique']"
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["found"])
    return ir.Model(ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10)


def test_an_operator_that_it_does_not_take_is_named_with_its_module(tmp_path: Path) -> None:
    with pytest.raises(RuntimeTargetError) as caught:
        build(unsupported(), tmp_path)
    message = str(caught.value)
    assert "node 'odd' (Unique, module 'encoder.pick')" in message
    assert "; deploy this bundle with onnxruntime" in message and "\n" not in message
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("damage", ["graph", "weights"])
def test_a_corrupted_graph_is_one_line(gpt2: dict[str, ir.Model], tmp_path: Path, damage: str) -> None:
    path = save_graph(gpt2["prefill"], tmp_path)
    inputs = _signature(load_graph(path).graph.inputs)
    broken = path if damage == "graph" else Path(f"{path}.data")
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    request = BuildRequest(
        target=RTX, graph=str(path), inputs=inputs, profile={name: Sizes(1, 4, 8) for name in dimensions(inputs)}
    )
    with pytest.raises(RuntimeTargetError) as caught:
        build_engine(request, tmp_path / "engine")
    assert "tensorrt-rtx" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "engine").exists()
