"""Keep every layer a node of its own while the exporter simplifies its graph.

onnxscript's optimizer, which both exporters run, does three things that a base graph must not have:

- it folds a BatchNormalization into the layer before it.  The product keeps the layer's weight name but neither its
  values nor its module path, so that site would not be found, and a LoRA, which adds to the layer's output *before*
  the norm, would not be scaled by it.  A runtime does this fold by itself, after the adapter is in.
- it folds a Pad of another module into the convolution after it.  The convolution's input is then the unpadded tensor,
  and δ, which reaches the padding in PyTorch, would not.
- it computes layers whose input is constant (DeBERTa's projections of its relative positions), so that no node is left
  to adapt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir

from deployfa.naming import SCOPES, module_path_of

__all__ = ["whole_layers"]

_CONVOLUTIONS = {"Conv", "ConvTranspose"}
_HIDDEN = "deployfa.hidden"
_LAYERS = {"MatMul", "Gemm", *_CONVOLUTIONS}


@contextlib.contextmanager
def whole_layers() -> Iterator[None]:
    """Inside the block ``onnxscript.optimizer.optimize_ir`` keeps layers, norms and foreign Pads.

    The attribute is replaced, as transformers' exporter does for its own ends; the two compose.
    """
    from onnxscript import optimizer

    original: Callable[..., None] = optimizer.optimize_ir

    def optimize(model: ir.Model, *args: Any, **options: Any) -> None:
        asked: Callable[[ir.Node], bool | None] = options.pop("should_fold", lambda _: None)

        def should_fold(node: ir.Node) -> bool | None:
            return False if node.op_type in _LAYERS else asked(node)

        with _hidden(model):
            original(model, *args, should_fold=should_fold, **options)

    optimizer.optimize_ir = optimize
    try:
        yield
    finally:
        optimizer.optimize_ir = original


@contextlib.contextmanager
def _hidden(model: ir.Model) -> Iterator[None]:
    """Give the nodes that must stay a domain that the optimizer does not know, inside the block."""
    hidden = [node for node in model.graph.all_nodes() if node.domain == "" and _must_stay(node)]
    for node in hidden:
        node.domain = _HIDDEN
    model.opset_imports[_HIDDEN] = 1
    try:
        yield
    finally:
        for node in hidden:
            node.domain = ""
        # the optimizer may have found it unused
        model.opset_imports.pop(_HIDDEN, None)


def _must_stay(node: ir.Node) -> bool:
    if node.op_type != "Pad":
        return node.op_type == "BatchNormalization"
    readers = [reader for reader, _ in node.outputs[0].uses() if reader.op_type in _CONVOLUTIONS]
    # a convolution that pads by itself (`F.pad`, or a Pad module of its own) is one module in PyTorch too
    return not all(_is_inside(node, reader) for reader in readers)


def _is_inside(node: ir.Node, layer: ir.Node) -> bool:
    inner, outer = (module_path_of(each.metadata_props.get(SCOPES)) or "" for each in (node, layer))
    return f"{inner}.".startswith(f"{outer}.")
