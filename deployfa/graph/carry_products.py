"""Take a change backwards through nodes that compute: products, weighted sums, means, ReLU, masks.

A weighted sum over tokens, a product and a mean are linear in each operand; ReLU and max are homogeneous for a positive
factor.  Every rule is ``rule(node, output, change of the output) → [(index of an input, its change)]`` and raises
``Blocked``.  Sources: the ONNX pages of the operators; ONNX Runtime's of MultiHeadAttention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deployfa.edits import Float64
from deployfa.graph.carry import Blocked, Carried, Step, collapsed, operand, restrict, shape_of
from deployfa.graph.views import constant

__all__ = ["attention", "matmul", "mean", "multi_head", "pool", "positive", "product", "where"]


def matmul(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Attention's weighted sum, ``P V``: features of V pass, tokens are summed over."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a weighted sum")
    if carried.factor.ndim < 2 or carried.factor.shape[-2] != 1:
        raise Blocked("input is a product of two computed values")
    if len(shape_of(node.inputs[1])) < 2:
        raise Blocked("input is a product with a vector")
    return [(1, restrict(carried, operand(node, 1)))]


def product(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """``gate ⊙ up``: either operand may take the factor."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a product")
    steps, reason = [], Blocked("input is a product")
    for index in range(2 if node.op_type == "Mul" else 1):
        value = operand(node, index)
        if constant(value) is None and (value.producer() is not None or value.is_graph_input()):
            try:
                steps.append((index, restrict(carried, value)))
            except Blocked as blocked:
                reason = blocked
    if not steps:
        raise reason
    return steps


def positive(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """ReLU and max-pooling: ``f(c v) = c f(v)`` for c > 0."""
    if carried.shift is not None:
        raise Blocked(f"δ does not pass {node.op_type}")
    if not (carried.factor > 0.0).all():
        raise Blocked(f"input comes from {node.op_type}, which only a positive scale passes, but some 1+λ ≤ 0")
    return [(0, _outside_windows(node, carried))]


def pool(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    if carried.shift is not None and node.op_type == "AveragePool":
        raise Blocked("δ does not pass AveragePool, which pads with zeros")
    return [(0, _outside_windows(node, carried))]


def _outside_windows(node: ir.Node, carried: Carried) -> Carried:
    """``carried``, which must not vary over the axes that a pooling takes together: all but batch and channels."""
    arrays = [carried.factor] + ([carried.shift] if carried.shift is not None else [])
    if "Pool" in node.op_type and any(size != 1 for array in arrays for size in array.shape[2:]):
        raise Blocked(f"input comes from {node.op_type} over its features")
    return carried


def mean(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    rank = len(shape_of(node.inputs[0]))
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = [int(a) for a in given.numpy().reshape(-1)] if given is not None else node.attributes.get_ints("axes", [])
    if not axes:
        raise Blocked(f"input comes from {node.op_type} over all axes")
    reduced = sorted(axis % rank for axis in axes)
    if carried.shift is not None and node.op_type == "ReduceSum":
        raise Blocked("δ does not pass a sum")
    keeps = node.attributes.get_int("keepdims", 1) != 0

    def widen(array: Float64) -> Float64:
        widened = array if keeps else np.expand_dims(array, tuple(reduced))
        if any(widened.shape[axis] != 1 for axis in reduced):
            raise Blocked(f"input comes from {node.op_type} over its features")
        return widened

    return [(0, carried.mapped(widen))]


def where(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """``Where(mask, 0, v)``: zeros stay zeros."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a mask")
    for index in (1, 2):
        other = constant(operand(node, 3 - index))
        if other is not None and not other.numpy().any():
            return [(index, restrict(carried, operand(node, index)))]
    raise Blocked("input is chosen from two values")


def attention(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """ONNX Attention: heads of V pass; a key-value head serves ``q_heads / kv_heads`` query heads in a row."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a weighted sum")
    four = len(shape_of(output)) == 4
    _only_weighs(node, output, carried, tokens=2 if four else 1, past=5)
    value = operand(node, 2)
    if four:
        heads = carried.factor.shape[1]
        kept = shape_of(value)[1]
        grouped = carried.factor if heads == 1 or not isinstance(kept, int) else _one_per_group(carried.factor, 1, kept)
        return [(2, Carried(grouped))]
    heads = node.attributes.get_int("q_num_heads", 0)
    kept = node.attributes.get_int("kv_num_heads", 0)
    return [(2, Carried(_heads_of_flat(carried.factor, heads, kept)))]


def multi_head(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """com.microsoft MultiHeadAttention with V of its own, (batch, tokens, features)."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a weighted sum")
    apart = len(node.inputs) > 2 and node.inputs[2] is not None and len(shape_of(node.inputs[2])) == 3
    biased = len(node.inputs) > 3 and node.inputs[3] is not None
    if not apart or biased:
        raise Blocked("input comes from an attention whose values are packed with its queries and keys")
    _only_weighs(node, output, carried, tokens=1, past=7)
    return [(2, carried)]


def _only_weighs(node: ir.Node, output: ir.Value, carried: Carried, *, tokens: int, past: int) -> None:
    """Raise ``Blocked`` unless the attention sums over what does not vary, and V goes nowhere but into ``output``."""
    if output is not node.outputs[0] or any(each.uses() or each.is_graph_output() for each in node.outputs[1:]):
        raise Blocked("input comes from an attention that also answers its keys and values")
    if len(node.inputs) > past and node.inputs[past] is not None:
        raise Blocked("input comes from an attention that also reads values of earlier tokens")
    if carried.factor.shape[tokens] != 1:
        raise Blocked("1+λ varies over the tokens that attention sums over")


def _heads_of_flat(factor: Float64, heads: int, kept: int) -> Float64:
    if not heads or not kept:
        raise Blocked("input comes from an attention of unknown heads")
    if factor.shape[-1] == 1 or heads == kept:
        return factor
    grouped = _one_per_group(factor.reshape(*factor.shape[:-1], heads, -1), factor.ndim - 1, kept)
    return grouped.reshape(*factor.shape[:-1], -1)


def _one_per_group(factor: Float64, axis: int, groups: int) -> Float64:
    split = factor.reshape(*factor.shape[:axis], groups, -1, *factor.shape[axis + 1 :])
    return np.asarray(np.take(collapsed(split, axis + 1), 0, axis=axis + 1))
