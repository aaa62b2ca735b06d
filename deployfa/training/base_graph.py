"""Export the base model to its base graph, once.

``transformers.exporters.OnnxExporter`` does the work for its own models (attention masks, dynamic shapes),
``torch.onnx.export`` for any other; here their graph is made readable: dimensions are called ``batch`` and
``sequence``, weights after their modules, and nothing of the machine that made it stays in the metadata.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from deployfa.edits import Array
from deployfa.errors import ExportError
from deployfa.naming import SCOPES, TRANSPOSED, module_path_of
from deployfa.training.base import Base, quiet
from deployfa.training.decoder import cache_of, decoder_call, name_decoder
from deployfa.training.reference import answer, float64_throughout
from deployfa.training.samples import Sample, sample_of
from deployfa.training.whole_layers import whole_layers

__all__ = ["export_base_graph", "export_module", "probe"]


def export_base_graph(base: Base) -> ir.Model:
    """The ONNX graph of ``base``, dynamic over the batch (and the sequence, of text), module paths kept.

    Raises ``ExportError`` with the exporter's first line.
    """

    model = base.model.eval()
    _make_fresh_weights_unique(model, base.fresh_modules)
    sample = sample_of(base)
    if base.does.kind == "prompt":
        return _export_decoder(model, sample)
    with _without_cache(model):
        return export_module(model, sample.traced, sample.dynamic)


def export_module(
    model: nn.Module, feeds: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> ir.Model:
    """The ONNX graph of ``model`` in eval mode, module paths kept.

    feeds: name of a keyword of ``forward`` → sample tensor.  dynamic: input → axis → the name of the dimension there;
    every other axis is fixed at the sample's.  Raises ``ExportError`` with the exporter's first line.
    """
    shapes = {
        name: {axis: torch.export.Dim.DYNAMIC for axis in dynamic.get(name, {}) if axis < tensor.dim()}
        for name, tensor in feeds.items()
    }
    program = _traced(model, dict(feeds), shapes)
    _name_dimensions(program.graph, dynamic)
    _tidy(program)
    return program


def _export_decoder(model: nn.Module, sample: Sample) -> ir.Model:
    """One graph that reads prompts and goes on from them; the cache is one keyword of ``forward``."""
    call = decoder_call(sample.traced)
    del call["use_cache"]
    axes = {name: dict.fromkeys(names, torch.export.Dim.DYNAMIC) for name, names in sample.dynamic.items()}
    cached = [axes[name] for name in sample.traced if name not in call]
    shapes: dict[str, Any] = {name: cached if name == "past_key_values" else axes[name] for name in call}
    program = _traced(model, call, shapes)
    name_decoder(program.graph, cache_of(model))
    _name_dimensions(program.graph, sample.dynamic)
    _tidy(program)
    return program


def _traced(model: nn.Module, feeds: dict[str, Any], shapes: dict[str, Any]) -> ir.Model:
    try:
        # the exporters print their progress on standard output, which belongs to --json
        with quiet(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), whole_layers():
            return _export(model.eval(), feeds, shapes)
    except Exception as error:
        # any of three libraries may fail here, each with its own exceptions
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"exporting {type(model).__name__} failed ({first_line}); try other versions of torch"
        ) from error


def _tidy(program: ir.Model) -> None:
    _clean_metadata(program)
    _name_weights(program)


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A classifier answers its logits: keys and values of a decoder as further outputs would be computed for nobody,
    and keep a scale from going through attention into the values."""
    config: Any = model.config
    before = getattr(config, "use_cache", None)
    if before is None:
        yield
        return
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def _export(model: nn.Module, feeds: dict[str, Any], shapes: dict[str, Any]) -> ir.Model:
    from transformers import PreTrainedModel
    from transformers.exporters import OnnxConfig, OnnxExporter

    program: ir.Model
    if isinstance(model, PreTrainedModel):
        config = OnnxConfig(dynamic=True, dynamic_shapes=shapes)
        program = OnnxExporter().export(model, feeds, config).program
        return program
    exported = torch.onnx.export(model, kwargs=feeds, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert exported is not None  # only dynamo=False returns nothing
    program = exported.model
    return program


def probe(base: Base) -> tuple[dict[str, Array], Array, Array]:
    """Feeds at another shape than the exporter saw, and what PyTorch answers in float64 and in float32: what the graph
    is checked against, and the noise that it is allowed."""
    feeds = {name: tensor.numpy() for name, tensor in sample_of(base).elsewhere.items()}
    with torch.inference_mode():
        with float64_throughout():
            truth = answer(copy.deepcopy(base.model).double(), feeds)
        single = answer(base.model, feeds)
    return feeds, truth, single


def _make_fresh_weights_unique(model: nn.Module, fresh: tuple[str, ...]) -> None:
    """Fill modules that the adapter will replace with noise, so that the exporter merges none of them with another
    (it dedupes equal initializers) and removes no zero bias."""
    generator = torch.Generator().manual_seed(0)
    for path in fresh:
        for parameter in model.get_submodule(path).parameters(recurse=False):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _name_dimensions(graph: ir.Graph, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """torch's ``s72`` → ``batch``, as ``dynamic`` names the axis at which an input has it."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                name = dynamic.get(value.name or "", {}).get(axis, str(dim.value))
                names.setdefault(str(dim.value), name)
    values = list(graph.inputs) + [output for node in graph.all_nodes() for output in node.outputs]
    for value in values:
        if value.shape is None:
            continue
        dims = [
            ir.SymbolicDim(names.get(str(dim.value), str(dim.value)))
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None
            else dim
            for dim in value.shape
        ]
        value.shape = ir.Shape(dims)


def _clean_metadata(model: ir.Model) -> None:
    """Keep the module path of each node; drop stack traces, which name files of this machine."""
    owners: list[Any] = [
        model,
        model.graph,
        *model.graph.all_nodes(),
        *model.graph.inputs,
        *model.graph.initializers.values(),
    ]
    owners += [output for node in model.graph.all_nodes() for output in node.outputs]
    for owner in owners:
        for key in [key for key in owner.metadata_props if key != SCOPES]:
            del owner.metadata_props[key]
    model.graph.doc_string = None


def _name_weights(model: ir.Model) -> None:
    """``val_69`` → ``encoder.layer.0.attention.self.query.weight.T``: the exporter transposed it, the name says so.

    A module that is called twice (ALBERT's shared layer) has its weight transposed and stored once a call; the calls
    get the first one back.
    """
    named: dict[str, ir.Value] = {}
    for node in model.graph.all_nodes():
        if node.op_type != "MatMul" or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        path = module_path_of(node.metadata_props.get(SCOPES))
        if path is None or weight is None or not weight.is_initializer() or not (weight.name or "").startswith("val_"):
            continue
        name = f"{path}.weight{TRANSPOSED}"
        first = named.get(name)
        if first is None and name not in model.graph.initializers:
            weight.name = name
            named[name] = weight
        elif first is not None and _equal(first, weight):
            stored = weight.name or ""
            node.replace_input_with(1, first)
            if not weight.uses():
                del model.graph.initializers[stored]


def _equal(first: ir.Value, second: ir.Value) -> bool:
    one, other = first.const_value, second.const_value
    return one is not None and other is not None and bool(np.array_equal(one.numpy(), other.numpy()))
