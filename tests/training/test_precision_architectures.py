"""float16-typed graphs against PyTorch's own float16, both held against float64.

ONNX Runtime's CPU provider rounds what goes from node to node and computes within a node in float32.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from architectures import ARCHITECTURES

from deployfa.edits import Array
from deployfa.graph.evaluate import evaluate
from deployfa.graph.precision import type_graph
from deployfa.graph.storage import save_graph
from deployfa.parity.measures import normwise
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.training.base_graph import export_module

#: Of PyTorch's float16 error, what a typed graph may have.
LIMIT = 3.0


def answer(model: Any, feeds: dict[str, torch.Tensor], dtype: torch.dtype, output: str | None) -> Array:
    typed = copy.deepcopy(model).to(dtype)
    fed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in feeds.items()}
    with torch.no_grad():
        found = typed(**fed)
    found = found if output is None else found[output]
    return np.asarray(found.double().numpy())


def run(graph: ir.Model, feeds: dict[str, torch.Tensor], folder: Path, output: str | None) -> Array:
    folder.mkdir()
    runner = OnnxRuntimeRunner(save_graph(graph, folder), threads=1, spinning=False)
    found = runner.run({spec.name: feeds[spec.name].numpy() for spec in runner.inputs})
    return found[output or runner.outputs[0].name].astype(np.float64)


def errors(name: str, folder: Path, model: Any = None) -> tuple[float, float]:
    """Of the typed graph and of PyTorch float16, normwise relative to float64."""
    architecture = ARCHITECTURES[name]
    model = architecture.model() if model is None else model
    feeds = architecture.feeds(architecture.rows)
    truth = answer(model, feeds, torch.float64, architecture.output)
    half = answer(model, feeds, torch.float16, architecture.output)
    graph = export_module(model, architecture.feeds(2), architecture.dynamic)
    typed = type_graph(graph, "fp16")
    assert sum(typed.low.values()) > 10
    return normwise(run(typed.model, feeds, folder / "typed", architecture.output), truth), normwise(half, truth)


@pytest.mark.parametrize(
    "name",
    [
        "MiniLM-L6 (real weights)",
        "GPT-2 (classifier)",
        "Llama (grouped queries)",
        "Gemma",
        "T5 (encoder)",
        "ViT",
        "ConvNeXt",
        "EfficientNet-Lite0 (real weights)",
    ],
)
def test_a_typed_graph_is_as_near_as_pytorch_in_float16(name: str, tmp_path: Path) -> None:
    typed, half = errors(name, tmp_path)
    assert 1e-6 < typed <= LIMIT * half, "float32 would be nearer, and prove nothing"


#: What Llama's norm is made of; x² is beyond float16 from x = 256 on.
_NORM = frozenset({"Pow", "Mul", "ReduceMean", "Add", "Sqrt", "Div", "Reciprocal", "RMSNormalization"})


def loud() -> Any:
    """Llama whose residual has values near 1000, which its norms take out again."""
    model = ARCHITECTURES["Llama (grouped queries)"].model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000.0)
    return model


def test_a_norm_in_float16_is_seen_where_its_squares_overflow() -> None:
    """In numpy's float16, which rounds after every operator: ONNX Runtime's CPU provider computes them in float32 and
    leaves out the casts between two of them, so that nothing overflows there."""
    architecture = ARCHITECTURES["Llama (grouped queries)"]
    feeds = architecture.feeds(architecture.rows)
    found = {}
    for name, model in {"loud": loud(), "quiet": architecture.model()}.items():
        truth = answer(model, feeds, torch.float64, "logits")
        allowed = LIMIT * normwise(answer(model, feeds, torch.float16, "logits"), truth)
        graph = export_module(model, architecture.feeds(2), architecture.dynamic)
        for forced in (frozenset[str](), _NORM):
            typed = type_graph(graph, "fp16", force_low=forced)
            arrays = {key: tensor.numpy() for key, tensor in feeds.items()}
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                (answers,) = evaluate(typed.model, [arrays], dtype="float32")
            found[name, bool(forced)] = normwise(answers["logits"].astype(np.float64), truth) <= allowed
    # a norm in float16 passes where nothing overflows: it is the overflow that is seen
    assert found == {("loud", False): True, ("loud", True): False, ("quiet", False): True, ("quiet", True): True}
