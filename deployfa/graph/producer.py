"""Placement ``producer``: fold λ into the rows of the layer that makes the site's input.

The input is ``P u + p``, carried here by steps that keep features apart: ``P' = diag(1+λ) P``, ``p' = (1+λ) p``.  Of a
quantised layer the factor goes onto the scales of its rows: exact, and the integers stay as they are.
Source: arXiv 2510.19155 for T.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from deployfa.edits import Float64
from deployfa.graph.large import is_large, scale_rows
from deployfa.graph.layers import Use
from deployfa.graph.own_weight import scale_weight, write_weight
from deployfa.graph.sites import Site
from deployfa.graph.tensors import cast_once, set_operand
from deployfa.graph.weights import widened

__all__ = ["fold_into_producers", "producer_bytes"]


def producer_bytes(use: Use) -> int:
    """What a patch of the layer ships: its weight, or its scales, and its bias."""
    bias = use.bias
    return use.weight.stored_bytes + (bias.stored_bytes if bias is not None else 0)


def fold_into_producers(graph: ir.Graph, uses: Sequence[Use], factor: Float64, name: str) -> None:
    """``P' = diag(f) P``, ``p' = f ⊙ p`` in layers that read one stored weight; f: (d,)."""
    layer = Site(f"{name}/producer", tuple(uses))
    first = uses[0]
    if first.weight.quantised:
        scale_weight(graph, layer, "out", factor)
    elif is_large(first.weight):
        scaled_rows = scale_rows(first.weight, factor, first.axis("out"), name)
        set_operand(graph, layer.nodes, 1, scaled_rows, name=f"{layer.path}.weight")
    else:
        numbers = first.weight.numbers().astype(np.float64)
        if first.layout == "conv transpose":
            # (k, d/groups, …): the rows of group g are the outputs g d/groups … of its own inputs
            per_group = factor.reshape(first.groups, 1, -1)
            grouped = numbers.reshape(first.groups, -1, *numbers.shape[1:])
            scaled = (grouped * per_group.reshape(*per_group.shape, *[1] * (numbers.ndim - 2))).reshape(numbers.shape)
        else:
            scaled = numbers * widened(factor, first.axis("out"), numbers.ndim)
        write_weight(graph, layer, scaled)
    done: set[ir.Value] = set()
    for use in uses:
        bias, node = use.bias, use.bias_node
        if bias is None or node is None or bias.operand in done:
            continue
        done.add(bias.operand)
        if bias.scales is not None:
            scaled = bias.scales.scaled(len(bias.scales.size) - 1, factor)
            stored = cast_once(scaled, bias.scales.dtype, name)
            set_operand(graph, [bias.scales.node], bias.scales.index, stored, name=f"{name}/producer_bias_scale")
            continue
        sharing = [other for other in uses if other.bias_value is use.bias_value]
        nodes = [other.bias_node for other in sharing if other.bias_node is not None]
        array = cast_once(bias.numbers().astype(np.float64) * factor, bias.operand.dtype or bias.dtype, name)
        set_operand(graph, nodes, use.bias_index, array, name=f"{name}/producer_bias")
