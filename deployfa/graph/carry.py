"""What must become of a value so that a site reads T(x): ``factor ⊙ v + shift``.

Both arrays have the rank of the value they speak of; an axis on which they do not vary has length 1, so nothing needs
to be known about batch or sequence.  ``deployfa.graph.backwards`` takes a change from a node's output to its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Float64

__all__ = ["Blocked", "Carried", "Shape", "Step", "collapsed", "narrowed", "operand", "restrict", "shape_of"]


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


#: Numbers, names, and ``None`` where nothing is known.
Shape = tuple[int | str | None, ...]
#: (index of the input, what must become of it)
Step = tuple[int, Carried]


def restrict(carried: Carried, value: ir.Value) -> Carried:
    """What must become of an operand that broadcasts: it has fewer axes, or one element where the result has many."""
    shape = shape_of(value)

    def fit(array: Float64) -> Float64:
        while array.ndim > len(shape):
            array = collapsed(array, 0)[0]
        for axis in range(-1, -array.ndim - 1, -1):
            if shape[axis] == 1:
                array = collapsed(array, axis)
        return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)

    return carried.mapped(fit)


def collapsed(array: Float64, axis: int) -> Float64:
    """``array`` with length 1 along ``axis``, on which it must not vary."""
    first = np.take(array, [0], axis=axis)
    if not (array == first).all():
        raise Blocked("1+λ differs between features that share one source (a key-value group)")
    return first


def narrowed(array: Float64, axis: int) -> Float64:
    first: Array = np.take(array, [0], axis=axis)
    return first if array.shape[axis] > 1 and (array == first).all() else array


def operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise Blocked(f"input comes from {node.op_type} without an operand")
    return value


def shape_of(value: ir.Value | None) -> Shape:
    """The shape of ``value``: numbers, names, ``None`` where nothing is known; ``Blocked`` if its rank is not."""
    if value is None or value.shape is None:
        raise Blocked("a shape on the way is not known")
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
