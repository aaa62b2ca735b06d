"""How a scale and a shift of features travel backwards through one node.

``Carried(factor, shift)`` says what must become of a value v: ``factor ⊙ v + shift``.  ``backwards(node, …)`` asks what
must then become of one of the node's inputs.  Both arrays have the rank of the value they speak of; an axis on which
they do not vary has length 1, so nothing needs to be known about batch or sequence.

Exact for every rule here: views move features; a weighted sum over tokens, a product and a mean are linear in each
operand; ReLU and max are homogeneous for a positive factor.  What is not listed blocks, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Float64
from deployfa.graph.views import constant

__all__ = ["Blocked", "Carried", "Step", "backwards", "restrict"]


class Blocked(Exception):
    """The fact that keeps a factor from passing; never leaves ``deployfa.graph``."""


@dataclass(frozen=True, eq=False)
class Carried:
    """``factor ⊙ v + shift``."""

    factor: Float64
    shift: Float64 | None = None

    def mapped(self, change: Callable[[Float64], Float64]) -> Carried:
        return Carried(change(self.factor), None if self.shift is None else change(self.shift))

    def same(self, other: Carried) -> bool:
        """Whether both ask for one change, to the bit."""
        mine, its = (np.zeros(()) if each.shift is None else each.shift for each in (self, other))
        return bool((self.factor == other.factor).all() and (mine == its).all())

    @property
    def identity(self) -> bool:
        return bool((self.factor == 1.0).all()) and (self.shift is None or not self.shift.any())


_Shape = tuple[int | str | None, ...]
#: (index of the input, what must become of it)
Step = tuple[int, Carried]


def backwards(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """The inputs of ``node`` that can take the change instead of ``output``: one of them is enough.

    Raises ``Blocked`` with the reason if none can.
    """
    rule = _RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else _MICROSOFT.get(node.op_type)
    if rule is None:
        if node.op_type in {"Add", "Sub", "Sum", "SkipLayerNormalization"}:
            raise Blocked("input is a sum (a residual), whose other part is not scaled")
        if "uantize" in node.op_type or "QLinear" in node.op_type:
            raise Blocked("input is quantised on the way, which a scale does not pass exactly")
        raise Blocked(f"input comes from {node.op_type}, which a scale does not pass")
    return rule(node, output, carried)


def restrict(carried: Carried, value: ir.Value) -> Carried:
    """What must become of an operand that broadcasts: it has fewer axes, or one element where the result has many."""
    shape = _shape(value)

    def fit(array: Float64) -> Float64:
        while array.ndim > len(shape):
            array = _collapsed(array, 0)[0]
        for axis in range(-1, -array.ndim - 1, -1):
            if shape[axis] == 1:
                array = _collapsed(array, axis)
        return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)

    return carried.mapped(fit)


def _same(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    return [(0, carried)]


def _cast(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    source = node.inputs[0]
    if source is None or source.dtype is None or not source.dtype.is_floating_point():
        raise Blocked("input is cast from integers")
    return [(0, carried)]


def _reshape(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    before, after = _shape(node.inputs[0]), _shape(output)

    def regroup(array: Float64) -> Float64:
        return regrouped(array, after, before)

    return [(0, carried.mapped(regroup))]


def regrouped(array: Float64, after: _Shape, before: _Shape) -> Float64:
    """``array`` over a value of shape ``after`` as one over the same value in shape ``before``.

    Axes that both shapes end with stay.  Of the rest, those on which the array varies must lie in a part that both cut
    off with one, known, size; or in one axis of unknown size (batch x heads), on which the array then repeats.
    """
    kept = 0
    while kept < min(len(after), len(before)) and after[-1 - kept] == before[-1 - kept] is not None:
        kept += 1
    cut = len(after) - kept
    tail = array.shape[cut:]
    lead = _regrouped_lead(array.reshape(*array.shape[:cut], -1), after[:cut], before[: len(before) - kept])
    return lead.reshape(*lead.shape[:-1], *tail)


def _regrouped_lead(array: Float64, after: _Shape, before: _Shape) -> Float64:
    """The axes that differ; the last axis of ``array`` holds everything that stays."""
    first = next((axis for axis, size in enumerate(array.shape[:-1]) if size > 1), None)
    if first is None:
        return array.reshape(*[1] * len(before), -1)
    for start in range(first, -1, -1):
        own = _numbers(after[start:])
        if own is None:
            break
        for at in range(len(before), -1, -1):
            other = _numbers(before[at:])
            if other is None:
                break
            if math.prod(other) == math.prod(own):
                full = np.broadcast_to(array[(0,) * start], (*own, array.shape[-1])).reshape(*other, -1)
                for axis in range(len(other)):
                    full = _narrowed(full, axis)
                return full.reshape(*[1] * at, *full.shape)
    inner = _numbers(after[first:])
    if inner is not None and len(before) == 1:
        # (batch, heads, …) as (batch * heads, …)
        return np.broadcast_to(array[(0,) * first], (*inner, array.shape[-1])).reshape(math.prod(inner), -1)
    if len(after) == 1:
        for at in range(len(before)):
            other = _numbers(before[at:])
            if other is not None and math.prod(other) == array.shape[0]:
                return array.reshape(*[1] * at, *other, -1)
    raise Blocked("input is reshaped across its features")


def _numbers(shape: _Shape) -> tuple[int, ...] | None:
    """``shape`` if every dimension is a number."""
    known = tuple(dim for dim in shape if isinstance(dim, int))
    return known if len(known) == len(shape) else None


def _transpose(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    perm = node.attributes.get_ints("perm", list(range(carried.factor.ndim))[::-1])
    inverse = np.argsort(perm)
    return [(0, carried.mapped(lambda array: array.transpose(inverse)))]


def _matmul(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Attention's weighted sum, ``P V``: features of V pass, tokens are summed over."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a weighted sum")
    if carried.factor.ndim < 2 or carried.factor.shape[-2] != 1:
        raise Blocked("input is a product of two computed values")
    if len(_shape(node.inputs[1])) < 2:
        raise Blocked("input is a product with a vector")
    return [(1, restrict(carried, _input(node, 1)))]


def _product(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """``gate ⊙ up``: either operand may take the factor."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a product")
    steps, reason = [], Blocked("input is a product")
    for index in range(2 if node.op_type == "Mul" else 1):
        value = _input(node, index)
        if constant(value) is None and (value.producer() is not None or value.is_graph_input()):
            try:
                steps.append((index, restrict(carried, value)))
            except Blocked as blocked:
                reason = blocked
    if not steps:
        raise reason
    return steps


def _positive(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """ReLU and max-pooling: ``f(c v) = c f(v)`` for c > 0."""
    if carried.shift is not None:
        raise Blocked(f"δ does not pass {node.op_type}")
    if not (carried.factor > 0.0).all():
        raise Blocked(f"input comes from {node.op_type}, which only a positive scale passes, but some 1+λ ≤ 0")
    return [(0, carried)]


def _pool(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    if carried.shift is not None and node.op_type == "AveragePool":
        raise Blocked("δ does not pass AveragePool, which pads with zeros")
    return [(0, carried)]


def _mean(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    rank = len(_shape(node.inputs[0]))
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


def _where(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """``Where(mask, 0, v)``: zeros stay zeros."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a mask")
    for index in (1, 2):
        other = constant(_input(node, 3 - index))
        if other is not None and not other.numpy().any():
            return [(index, restrict(carried, _input(node, index)))]
    raise Blocked("input is chosen from two values")


def _expand(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Key-value heads repeated for their group of query heads: exact where the factor repeats too."""
    return [(0, restrict(carried, _input(node, 0)))]


def _slice(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """A part of a value, by constant bounds; computed ones are as good where the factor does not vary."""
    shape = _shape(node.inputs[0])
    starts, ends, axes, steps = (_integers(node, index) for index in (1, 2, 3, 4))
    if axes is None:
        axes = list(range(len(starts))) if starts is not None else None
    if axes is None:
        raise Blocked("input is a slice with computed bounds")
    axes = [axis % len(shape) for axis in axes]
    if starts is None or ends is None:
        if any(carried.factor.shape[axis] != 1 for axis in axes) or carried.shift is not None:
            raise Blocked("input is a slice with computed bounds")
        return [(0, carried)]
    parts = zip(starts, ends, steps or [1] * len(axes), strict=True)
    return _parts(carried, shape, {axis: slice(*part) for axis, part in zip(axes, parts, strict=True)})


def _split(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    shape = _shape(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    sizes = [_shape(each)[axis] for each in node.outputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        raise Blocked("input is a part of a split of unknown size")
    at = list(node.outputs).index(output)
    return _parts(carried, shape, {axis: slice(sum(known[:at]), sum(known[: at + 1]), 1)})


def _gather(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Tokens picked (the first of a sequence), or one of several stacked values (Q, K, V): features stay."""
    shape, indices = _shape(node.inputs[0]), node.inputs[1]
    axis = node.attributes.get_int("axis", 0) % len(shape)
    rank = len(_shape(indices))

    def undo(array: Float64) -> Float64:
        if any(size != 1 for size in array.shape[axis : axis + rank]):
            raise Blocked("input is gathered along its features")
        return array.reshape(*array.shape[:axis], 1, *array.shape[axis + rank :])

    whole, given = carried.mapped(undo), constant(indices)
    size = shape[axis]
    if given is None or given.size != 1 or not isinstance(size, int):
        return [(0, whole)]
    index = int(given.numpy().reshape(())) % size
    return _parts(whole, shape, {axis: slice(index, index + 1, 1)})


def _gather_nd(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Rows picked by computed indices: the last axis is left whole."""
    shape, indices = _shape(node.inputs[0]), _shape(node.inputs[1])
    depth = indices[-1]
    batch = node.attributes.get_int("batch_dims", 0)
    if not isinstance(depth, int) or depth + batch >= len(shape):
        raise Blocked("input is gathered along its features")
    kept = len(shape) - depth - batch

    def undo(array: Float64) -> Float64:
        if any(size != 1 for size in array.shape[: array.ndim - kept]):
            raise Blocked("input is gathered along its features")
        return array.reshape((1,) * (len(shape) - kept) + array.shape[array.ndim - kept :])

    return [(0, carried.mapped(undo))]


def _pad(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    value = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    rank = carried.factor.ndim
    zero = value is None or not value.numpy().any()
    if carried.shift is not None or pads is None or not zero or (len(node.inputs) > 3 and node.inputs[3] is not None):
        raise Blocked("input is padded")
    around = pads.numpy().reshape(2, rank)
    if any(carried.factor.shape[axis] != 1 and around[:, axis].any() for axis in range(rank)):
        raise Blocked("input is padded along its features")
    return [(0, carried)]


def _attention(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """ONNX Attention: heads of V pass; a key-value head serves ``q_heads / kv_heads`` query heads in a row."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a weighted sum")
    if output is not node.outputs[0] or any(each.uses() or each.is_graph_output() for each in node.outputs[1:]):
        raise Blocked("input comes from an attention that also answers its keys and values")
    value = _input(node, 2)
    if len(_shape(output)) == 4:
        heads = carried.factor.shape[1]
        kept = _shape(value)[1]
        grouped = carried.factor if heads == 1 or not isinstance(kept, int) else _one_per_group(carried.factor, 1, kept)
        return [(2, Carried(grouped))]
    heads = node.attributes.get_int("q_num_heads", 0)
    kept = node.attributes.get_int("kv_num_heads", 0)
    return [(2, Carried(_heads_of_flat(carried.factor, heads, kept)))]


def _multi_head(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """com.microsoft MultiHeadAttention with V of its own, (batch, tokens, features)."""
    if carried.shift is not None:
        raise Blocked("δ does not pass a weighted sum")
    apart = len(node.inputs) > 2 and node.inputs[2] is not None and len(_shape(node.inputs[2])) == 3
    biased = len(node.inputs) > 3 and node.inputs[3] is not None
    if not apart or biased or any(each.uses() for each in node.outputs[1:]):
        raise Blocked("input comes from an attention whose values are packed with its queries and keys")
    return [(2, carried)]


def _heads_of_flat(factor: Float64, heads: int, kept: int) -> Float64:
    if not heads or not kept:
        raise Blocked("input comes from an attention of unknown heads")
    if factor.shape[-1] == 1 or heads == kept:
        return factor
    grouped = _one_per_group(factor.reshape(*factor.shape[:-1], heads, -1), factor.ndim - 1, kept)
    return grouped.reshape(*factor.shape[:-1], -1)


def _one_per_group(factor: Float64, axis: int, groups: int) -> Float64:
    split = factor.reshape(*factor.shape[:axis], groups, -1, *factor.shape[axis + 1 :])
    return np.asarray(np.take(_collapsed(split, axis + 1), 0, axis=axis + 1))


def _parts(carried: Carried, shape: _Shape, parts: dict[int, slice]) -> list[Step]:
    """``carried`` of a part of a value as one of the whole: the identity everywhere else, or, where the change does not
    vary along the cut, the same everywhere (whether the other parts allow it, their readers decide)."""
    steps: list[Step] = []
    try:
        embedded = carried
        for axis, part in parts.items():
            embedded = _embedded(embedded, axis, shape[axis], part)
        steps.append((0, embedded))
    except Blocked:
        if any(carried.factor.shape[axis] != 1 for axis in parts):
            raise
    if all(carried.factor.shape[axis] == 1 for axis in parts):
        steps.append((0, carried))
    return steps


def _embedded(carried: Carried, axis: int, size: int | str | None, part: slice) -> Carried:
    if not isinstance(size, int):
        raise Blocked("input is a part of a value of unknown size")
    indices = np.arange(size)[part]

    def embed(array: Float64, outside: float) -> Float64:
        full = np.full((*array.shape[:axis], size, *array.shape[axis + 1 :]), outside)
        place: tuple[Any, ...] = (*[slice(None)] * axis, indices)
        full[place] = array
        return _narrowed(full, axis)

    return Carried(embed(carried.factor, 1.0), None if carried.shift is None else embed(carried.shift, 0.0))


def _integers(node: ir.Node, index: int) -> list[int] | None:
    tensor = constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]


def _collapsed(array: Float64, axis: int) -> Float64:
    """``array`` with length 1 along ``axis``, on which it must not vary."""
    first = np.take(array, [0], axis=axis)
    if not (array == first).all():
        raise Blocked("1+λ differs between features that share one source (a key-value group)")
    return first


def _narrowed(array: Float64, axis: int) -> Float64:
    first: Array = np.take(array, [0], axis=axis)
    return first if array.shape[axis] > 1 and (array == first).all() else array


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Blocked(f"input comes from {node.op_type} without an operand")
    return value


def _shape(value: ir.Value | None) -> _Shape:
    """The shape of ``value``: numbers, names, ``None`` where nothing is known; ``Blocked`` if its rank is not."""
    if value is None or value.shape is None:
        raise Blocked("a shape on the way is not known")
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


_RULES: dict[str, Callable[[ir.Node, ir.Value, Carried], list[Step]]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Cast": _cast,
    "Div": _product,
    "Dropout": _same,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GlobalAveragePool": _pool,
    "GlobalMaxPool": _positive,
    "Identity": _same,
    "LeakyRelu": _positive,
    "MatMul": _matmul,
    "MaxPool": _positive,
    "Mul": _product,
    "Pad": _pad,
    "ReduceMean": _mean,
    "ReduceSum": _mean,
    "Relu": _positive,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
    "Where": _where,
}
_MICROSOFT: dict[str, Callable[[ir.Node, ir.Value, Carried], list[Step]]] = {"MultiHeadAttention": _multi_head}
