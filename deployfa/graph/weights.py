"""Where a layer keeps its numbers: the initializer, the views between it and the layer, and its scales if quantised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Float64
from deployfa.graph.scales import Scales, dequantizer, multiplier
from deployfa.graph.views import View, constant, read, view_of

__all__ = ["Layout", "Weight", "canonical", "in_layout", "read_weight"]

#: How a weight lies before the layer: ``dk`` (…, out, in) as in PyTorch, ``kd`` transposed, ``conv`` (out, in/groups,
#: …), ``conv transpose`` (in, out/groups, …).
Layout = Literal["dk", "kd", "conv", "conv transpose"]
_MOVES_ONLY = {"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of one layer as its node reads it.

    ``stored``: the initializer or graph input that holds the numbers, integers if ``scales`` is given.  ``nodes`` and
    ``views``: what makes the operand of it, in order; ``scales`` stand between the two (first the integers become
    floats, then the views move them).
    """

    operand: ir.Value
    stored: ir.Value
    shape: tuple[int, ...]
    nodes: tuple[ir.Node, ...] = ()
    views: tuple[View, ...] = ()
    scales: Scales | None = None

    @property
    def name(self) -> str:
        return self.stored.name or ""

    @property
    def dtype(self) -> ir.DataType | None:
        """The dtype in which floating-point numbers of this weight are stored: its own, or its scales'."""
        tensor = constant(self.stored)
        own = self.stored.dtype or (tensor.dtype if tensor is not None else None)
        return own if self.scales is None else self.scales.dtype

    @property
    def quantised(self) -> bool:
        return self.scales is not None

    @property
    def is_input(self) -> bool:
        return self.stored.is_graph_input()

    @property
    def is_constant(self) -> bool:
        return constant(self.stored) is not None

    @property
    def moves(self) -> tuple[View, ...]:
        """The views that move anything: equal for two readers that see the stored numbers in one order."""
        return tuple(view for view in self.views if not view.keeps)

    @property
    def stored_bytes(self) -> int:
        """What a change of this weight has to ship: all its numbers, or all its scales."""
        return self.scales.bytes if self.scales is not None else _itemsize(self.dtype) * math.prod(self.shape)

    @cached_property
    def readers(self) -> frozenset[ir.Node]:
        """Every node that reads the stored numbers, views looked through."""
        found: set[ir.Node] = set()
        waiting = [self.stored]
        while waiting:
            for node in waiting.pop().consumers():
                if node.op_type in _MOVES_ONLY:
                    waiting.extend(node.outputs)
                else:
                    found.add(node)
        return frozenset(found)

    @property
    def embeds(self) -> bool:
        """Whether an embedding looks rows up in the same numbers."""
        return any(node.op_type.startswith("Gather") for node in self.readers)

    def numbers(self) -> Array:
        """The operand's numbers: as stored, or float64 if they had to be dequantised."""
        tensor = constant(self.stored)
        assert tensor is not None  # callers look at is_constant first
        array = read(tensor)
        if self.scales is not None:
            array = self.scales.dequantize(array)
        for view in self.views:
            array = view.forward(array)
        return array

    def as_stored(self, operand: Array) -> Array:
        """What to store so that the views make ``operand`` of it."""
        for view in reversed(self.views):
            operand = view.backward(operand)
        return operand


def read_weight(operand: ir.Value | None) -> Weight | None:
    """The weight behind ``operand``; ``None`` if it is computed from anything but stored numbers."""
    nodes: list[ir.Node] = []
    found: Scales | None = None
    value = operand
    while value is not None and constant(value) is None and not value.is_graph_input():
        node = value.producer()
        if node is None or not node.inputs or node.domain not in {"", "ai.onnx"}:
            return None
        made = (dequantizer(node) or multiplier(node)) if found is None else None
        if made is not None:
            found, value = made, made.integers
        elif node.op_type in _MOVES_ONLY and found is None:
            nodes.insert(0, node)
            value = node.inputs[0]
        else:
            return None
    if value is None or operand is None:
        return None
    shape = _stored_shape(value)
    if shape is None:
        return None
    if value.dtype is not None and not value.dtype.is_floating_point() and found is None:
        return None
    views: list[View] = []
    for node in nodes:
        view = view_of(node, shape)
        if view is None:
            return None
        views.append(view)
        shape = view.shape(shape)
    return Weight(operand, value, shape, tuple(nodes), tuple(views), found)


def canonical(array: Array, layout: Layout, groups: int = 1) -> Array:
    """The operand as PyTorch's forward reads it: (…, d, k), or (d, k/groups, *kernel) for either convolution."""
    if layout == "kd":
        return array.swapaxes(-1, -2)
    if layout == "conv transpose":
        k, per_group = array.shape[:2]
        grouped = array.reshape(groups, k // groups, per_group, *array.shape[2:]).swapaxes(1, 2)
        return grouped.reshape(groups * per_group, k // groups, *array.shape[2:])
    return array


def in_layout(array: Array, layout: Layout, groups: int = 1) -> Array:
    """The inverse of ``canonical``."""
    if layout == "kd":
        return array.swapaxes(-1, -2)
    if layout == "conv transpose":
        d, per_group = array.shape[:2]
        grouped = array.reshape(groups, d // groups, per_group, *array.shape[2:]).swapaxes(1, 2)
        return grouped.reshape(groups * per_group, d // groups, *array.shape[2:])
    return array


def widened(vector: Sequence[float] | Array, axis: int, rank: int) -> Float64:
    """``vector`` along ``axis`` of an array of ``rank`` axes, ready to broadcast."""
    shape = [1] * rank
    shape[axis] = -1
    return np.asarray(vector, dtype=np.float64).reshape(shape)


def _stored_shape(value: ir.Value) -> tuple[int, ...] | None:
    tensor = constant(value)
    shape = tensor.shape if tensor is not None else value.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return None
    return tuple(int(dim) for dim in shape)  # type: ignore[arg-type]


def _itemsize(dtype: ir.DataType | None) -> int:
    return int(dtype.itemsize) if dtype is not None and dtype.is_floating_point() else 4
