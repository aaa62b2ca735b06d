"""What stands between a stored weight and the layer that reads it, as long as it only moves numbers.

Exporters leave such nodes: a ``Transpose`` before a MatMul, a ``Reshape`` of a packed weight, a ``Cast`` from float16.
Each can be undone, so a folded weight can be stored where, and as, the old one was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array

__all__ = ["Permute", "Resize", "View", "constant", "read", "static_shape", "tensor_shape", "view_of"]


class View(Protocol):
    """A step that moves numbers and changes none."""

    @property
    def keeps(self) -> bool:
        """Whether it does not even move them."""
        ...

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]: ...

    def forward(self, array: Array) -> Array: ...

    def backward(self, array: Array) -> Array: ...


@dataclass(frozen=True)
class Permute:
    """``Transpose``: axis i of the result is axis ``perm[i]`` of the operand."""

    perm: tuple[int, ...]

    @property
    def keeps(self) -> bool:
        return list(self.perm) == sorted(self.perm)

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(before[axis] for axis in self.perm)

    def forward(self, array: Array) -> Array:
        return array.transpose(self.perm)

    def backward(self, array: Array) -> Array:
        return array.transpose(np.argsort(self.perm))


@dataclass(frozen=True)
class Resize:
    """``Reshape``, ``Squeeze``, ``Unsqueeze``, ``Flatten``: the same numbers in the same order."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def keeps(self) -> bool:
        return self.before == self.after

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return self.after

    def forward(self, array: Array) -> Array:
        return array.reshape(self.after)

    def backward(self, array: Array) -> Array:
        return array.reshape(self.before)


def view_of(node: ir.Node, before: tuple[int, ...]) -> View | None:
    """The view that ``node`` is of its first input, which has shape ``before``; ``None`` if it is none."""
    if node.op_type == "Transpose":
        return Permute(tuple(node.attributes.get_ints("perm", list(range(len(before)))[::-1])))
    if node.op_type in {"Identity", "Cast"}:
        return Resize(before, before)
    after = static_shape(node.outputs[0])
    if after is None and node.op_type == "Reshape":
        after = _target(node, before)
    if after is None or node.op_type not in {"Reshape", "Squeeze", "Unsqueeze", "Flatten"}:
        return None
    return Resize(before, after) if math.prod(after) == math.prod(before) else None


def _target(node: ir.Node, before: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a Reshape asks for, its 0 and -1 worked out."""
    tensor = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if tensor is None or node.attributes.get_int("allowzero", 0) != 0:
        return None
    dims = [before[at] if dim == 0 else int(dim) for at, dim in enumerate(tensor.numpy().reshape(-1))]
    known = math.prod(dim for dim in dims if dim != -1)
    return tuple(math.prod(before) // known if dim == -1 else dim for dim in dims) if known else None


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """The shape of ``value`` if every dimension is a number."""
    if value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        return None
    return tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a stored tensor, in plain numbers."""
    return tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]


def read(tensor: ir.TensorProtocol) -> Array:
    """The numbers of a stored tensor.  A file is read, not mapped: mapped pages would stay in memory as long as the
    graph does, beside the fold that replaces them."""
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.itemsize != tensor.dtype.numpy().itemsize:
        return np.asarray(tensor.numpy())
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        data = file.read(tensor.nbytes)
    return np.frombuffer(data, dtype=tensor.dtype.numpy().newbyteorder("<")).reshape(tensor_shape(tensor))


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a ``Constant`` node; ``None`` for a graph input, whose value can change."""
    return None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
