"""Take a change backwards through nodes that only move features: views, parts, repetitions, padding.

Every rule is ``rule(node, output, change of the output) → [(index of an input, its change)]`` and raises ``Blocked``.
Sources: the ONNX pages of the operators.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from deployfa.edits import Float64
from deployfa.graph.carry import Blocked, Carried, Shape, Step, narrowed, operand, restrict, shape_of
from deployfa.graph.views import constant

__all__ = ["cast", "expand", "gather", "gather_nd", "pad", "reshape", "same", "slice_part", "split_part", "transpose"]


def same(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    return [(0, carried)]


def cast(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    source = node.inputs[0]
    if source is None or source.dtype is None or not source.dtype.is_floating_point():
        raise Blocked("input is cast from integers")
    return [(0, carried)]


def reshape(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    before, after = shape_of(node.inputs[0]), shape_of(output)

    def regroup(array: Float64) -> Float64:
        return regrouped(array, after, before)

    return [(0, carried.mapped(regroup))]


def regrouped(array: Float64, after: Shape, before: Shape) -> Float64:
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


def _regrouped_lead(array: Float64, after: Shape, before: Shape) -> Float64:
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
                    full = narrowed(full, axis)
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


def _numbers(shape: Shape) -> tuple[int, ...] | None:
    """``shape`` if every dimension is a number."""
    known = tuple(dim for dim in shape if isinstance(dim, int))
    return known if len(known) == len(shape) else None


def transpose(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    perm = node.attributes.get_ints("perm", list(range(carried.factor.ndim))[::-1])
    inverse = np.argsort(perm)
    return [(0, carried.mapped(lambda array: array.transpose(inverse)))]


def expand(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Key-value heads repeated for their group of query heads: exact where the factor repeats too."""
    return [(0, restrict(carried, operand(node, 0)))]


def slice_part(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """A part of a value, by constant bounds; computed ones are as good where the factor does not vary."""
    shape = shape_of(node.inputs[0])
    starts, ends, axes, steps = (_integers(node, index) for index in (1, 2, 3, 4))
    if axes is None and starts is not None and not _given(node, 3):
        axes = list(range(len(starts)))
    if axes is None:
        raise Blocked("input is a slice with computed bounds")
    axes = [axis % len(shape) for axis in axes]
    if starts is None or ends is None or (steps is None and _given(node, 4)):
        if any(carried.factor.shape[axis] != 1 for axis in axes) or carried.shift is not None:
            raise Blocked("input is a slice with computed bounds")
        return [(0, carried)]
    parts = zip(starts, ends, steps or [1] * len(axes), strict=True)
    return _parts(carried, shape, {axis: slice(*part) for axis, part in zip(axes, parts, strict=True)})


def split_part(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    shape = shape_of(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    sizes = [shape_of(each)[axis] for each in node.outputs]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        raise Blocked("input is a part of a split of unknown size")
    at = list(node.outputs).index(output)
    return _parts(carried, shape, {axis: slice(sum(known[:at]), sum(known[: at + 1]), 1)})


def gather(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Tokens picked (the first of a sequence), or one of several stacked values (Q, K, V): features stay."""
    shape, indices = shape_of(node.inputs[0]), node.inputs[1]
    axis = node.attributes.get_int("axis", 0) % len(shape)
    rank = len(shape_of(indices))

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


def gather_nd(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """Rows picked by computed indices: the last axis is left whole."""
    shape, indices = shape_of(node.inputs[0]), shape_of(node.inputs[1])
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


def pad(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    value = constant(node.inputs[2]) if _given(node, 2) else None
    rank = carried.factor.ndim
    zero = not value.numpy().any() if value is not None else not _given(node, 2)
    if carried.shift is not None or pads is None or not zero or _given(node, 3):
        raise Blocked("input is padded")
    around = pads.numpy().reshape(2, rank)
    if any(carried.factor.shape[axis] != 1 and around[:, axis].any() for axis in range(rank)):
        raise Blocked("input is padded along its features")
    return [(0, carried)]


def _parts(carried: Carried, shape: Shape, parts: dict[int, slice]) -> list[Step]:
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
        return narrowed(full, axis)

    return Carried(embed(carried.factor, 1.0), None if carried.shift is None else embed(carried.shift, 0.0))


def _given(node: ir.Node, index: int) -> bool:
    """Whether the node has that optional input, be it stored or computed."""
    return index < len(node.inputs) and node.inputs[index] is not None


def _integers(node: ir.Node, index: int) -> list[int] | None:
    tensor = constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if tensor is None else [int(number) for number in tensor.numpy().reshape(-1)]
