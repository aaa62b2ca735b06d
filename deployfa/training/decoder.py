"""A causal language model as one graph: it reads a prompt with an empty cache, and goes on with what it hands back.

transformers passes a cache as one object; a graph has its tensors as inputs and outputs of their own, called as in
Optimum: ``past_key_values.0.key`` → ``present.0.key``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch import nn

from deployfa.errors import ExportError
from deployfa.preprocess import Cache
from deployfa.preprocess.prompt import KEPT, cache_names

__all__ = ["cache_of", "decoder_call", "decoder_feeds", "name_decoder"]

_OBJECT = "past_key_values"


def cache_of(model: nn.Module) -> Cache:
    """The sizes of the cache that ``model`` keeps.

    Raises ``ExportError`` for one that is not keys and values alone.
    """
    ids = torch.tensor([[0, 1, 2]])
    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=True).past_key_values
    layers = getattr(found, "layers", None)
    if not layers or any(type(layer).__name__ != "DynamicLayer" for layer in layers):
        kind = type(layers[0]).__name__ if layers else type(found).__name__
        raise ExportError(f"{type(model).__name__} keeps a {kind}; only decoders with a plain cache of keys and values")
    shapes = {tuple(tensor.shape) for layer in layers for tensor in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise ExportError(f"the layers of {type(model).__name__} keep caches of several shapes; that is not supported")
    _, heads, _, head_size = shapes.pop()
    return Cache(layers=len(layers), heads=heads, head_size=head_size)


def decoder_call(feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The feeds of the graph as keywords of ``forward``: the cache's tensors as one object."""
    cache = transformers.DynamicCache()
    layer = 0
    while (key := feeds.get(f"{_OBJECT}.{layer}.key")) is not None:
        value = feeds[f"{_OBJECT}.{layer}.value"]
        # a cache grows in place: the feeds must not
        cache.update(key.clone(), value.clone(), layer)
        layer += 1
    rest = {name: tensor for name, tensor in feeds.items() if not name.startswith(f"{_OBJECT}.")}
    return {**rest, _OBJECT: cache, "use_cache": True}


def decoder_feeds(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, past: int) -> dict[str, torch.Tensor]:
    """What the graph is fed after ``past`` of ``ids``, (batch, sequence): the other tokens, and the cache of these.

    The logits of all new tokens but the first are kept.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        before = model(
            input_ids=ids[:, :past], attention_mask=mask[:, :past], position_ids=positions[:, :past], use_cache=True
        ).past_key_values
    feeds = {"input_ids": ids[:, past:], "attention_mask": mask, "position_ids": positions[:, past:]}
    for number, layer in enumerate(before.layers):
        feeds[f"{_OBJECT}.{number}.key"], feeds[f"{_OBJECT}.{number}.value"] = layer.keys, layer.values
    return {**feeds, KEPT: torch.arange(1, ids.shape[1] - past)}


def name_decoder(graph: ir.Graph, cache: Cache) -> None:
    """The exporter's ``input.past_key_values.layers.0.keys`` → ``past_key_values.0.key``, and the dimensions.

    Raises ``ExportError`` for a graph that hands on something else than keys and values.
    """
    names = list(cache_names(cache))
    pasts = [value for value in graph.inputs if _OBJECT in (value.name or "")]
    presents = list(graph.outputs)[1:]
    if len(pasts) != len(names) or len(presents) != len(names):
        raise ExportError(f"the decoder hands on {len(presents)} tensors where {len(names)} were expected")
    for (past, present), taken, given in zip(names, pasts, presents, strict=True):
        taken.name, given.name = past, present
        taken.shape = ir.Shape(["batch", cache.heads, "past_sequence", cache.head_size])
        given.shape = ir.Shape(["batch", cache.heads, "total_sequence", cache.head_size])
    graph.outputs[0].name = "logits"
    vocabulary = (graph.outputs[0].shape or [None])[-1]
    graph.outputs[0].shape = ir.Shape(["batch", "kept", vocabulary])
