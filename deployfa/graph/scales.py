"""The scales of a quantised weight: ``W = s ⊙ (q - z)`` with integers q that are never touched.

A factor on W's rows or columns is folded into s, exactly, where s has a cell of its own for every place where the
factor differs.  Sources: the ONNX pages of DequantizeLinear and MatMulInteger, ONNX Runtime's page of MatMulNBits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Float64
from deployfa.graph.views import constant, static_shape, tensor_shape

__all__ = ["Scales", "block_scales", "dequantized_blocks", "dequantizer", "integer_product", "multiplier"]

#: How the graph applies the scales: a DequantizeLinear, a Mul after a Cast, inside MatMulNBits, or a Mul after the
#: integer product.
Form = Literal["dequantize", "multiply", "blocks", "product"]


@dataclass(frozen=True, eq=False)
class Scales:
    """``value`` is read by ``node`` at input ``index``.

    ``size``: the shape of the integers (for ``blocks``, of the (d, k) matrix that they pack); ``cells``: how many
    scales stand along each of its axes, 1 where one scale covers the axis; ``block``: how many integers a cell covers.
    """

    form: Form
    integers: ir.Value
    node: ir.Node
    index: int
    value: ir.Value
    zero: ir.Value | None
    size: tuple[int, ...]
    cells: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def dtype(self) -> ir.DataType | None:
        tensor = constant(self.value)
        return tensor.dtype if tensor is not None else self.value.dtype

    @property
    def bytes(self) -> int:
        tensor = constant(self.value)
        return int(tensor.nbytes) if tensor is not None else 0

    @property
    def bits(self) -> int:
        """Of ``blocks``: how many bits one integer has."""
        return self.node.attributes.get_int("bits", 4)

    def numbers(self) -> Float64:
        """The scales, with one axis for each axis of the integers."""
        tensor = constant(self.value)
        assert tensor is not None  # the readers below take only constants
        return np.asarray(tensor.numpy()).astype(np.float64).reshape(self.cells)

    def why_not(self, axis: int, factor: Array) -> str | None:
        """What keeps ``factor``, (size[axis],), from going into the scales; ``None`` if it goes in exactly."""
        if self._widens(axis):
            return None
        covered = self._by_cell(axis, factor)
        if (covered == covered[:, :1]).all():
            return None
        count = min(self.block[axis], self.size[axis])
        return f"weight is quantised with one scale for {count} features, the factor differs among them"

    def scaled(self, axis: int, factor: Array) -> Float64:
        """The scales times ``factor`` along ``axis``, in the shape in which the graph keeps them; float64."""
        numbers = self.numbers()
        shape = [1] * len(self.size)
        shape[axis] = -1
        if self._widens(axis):
            result = numbers * np.asarray(factor, dtype=np.float64).reshape(shape)
            return result.reshape(-1) if self.form == "product" else result
        result = numbers * self._by_cell(axis, factor)[:, 0].reshape(shape)
        stored = constant(self.value)
        assert stored is not None  # the readers below take only constants
        return result.reshape(tensor_shape(stored))

    def dequantize(self, integers: Array) -> Float64:
        """``s ⊙ (q - z)``, in the shape of ``size``."""
        zero_tensor = constant(self.zero)
        zero = np.asarray(zero_tensor.numpy()) if zero_tensor is not None else None
        if self.form == "blocks":
            return dequantized_blocks(integers, self.numbers(), zero, self.size, self.block[1], self.bits)
        q = integers.astype(np.float64)
        if zero is not None and self.form == "multiply":
            # an operand that broadcasts, in a shape of its own
            q = q - zero.astype(np.float64)
        elif zero is not None and zero.size > 1:
            cells = self.cells if zero.size == math.prod(self.cells) else (1, zero.size)
            q = q - self._spread(zero.astype(np.float64).reshape(cells))
        elif zero is not None:
            q = q - float(zero.reshape(()))
        return np.asarray(q * self._spread(self.numbers()))

    @property
    def single(self) -> bool:
        """Whether this is one number that may become one for each input, or one for each output, but not both."""
        return self.form == "multiply" and math.prod(self.cells) == 1

    def _widens(self, axis: int) -> bool:
        """Whether a single scale may become one for each feature of ``axis``: it is an operand that broadcasts."""
        if self.form == "product":
            return self.cells[axis] == 1 and axis == 1
        return self.single

    def _by_cell(self, axis: int, factor: Array) -> Float64:
        """(cells, features in a cell); the last cell may be short, its last feature is repeated."""
        cells, block = self.cells[axis], self.block[axis]
        padded = np.pad(np.asarray(factor, dtype=np.float64), (0, cells * block - len(factor)), mode="edge")
        return padded.reshape(cells, block)

    def _spread(self, numbers: Float64) -> Float64:
        """One number for each integer, or 1 along an axis that has one for all."""
        for axis, (block, size) in enumerate(zip(self.block, self.size, strict=True)):
            if numbers.shape[axis] > 1 and block > 1:
                numbers = np.repeat(numbers, block, axis=axis).take(range(size), axis=axis)
        return numbers


def dequantizer(node: ir.Node) -> Scales | None:
    """A ``DequantizeLinear`` of stored integers: one scale, one along an axis, or one for each block of an axis."""
    if node.op_type != "DequantizeLinear" or len(node.inputs) < 2:
        return None
    integers, scale = node.inputs[0], node.inputs[1]
    tensor, size = constant(scale), _integers(integers)
    if integers is None or scale is None or tensor is None or size is None:
        return None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    shape = tensor_shape(tensor)
    axis = node.attributes.get_int("axis", 1) % max(len(size), 1)
    blocked = node.attributes.get_int("block_size", 0)
    if math.prod(shape) == 1 and not blocked:
        cells = (1,) * len(size)
    elif blocked:
        if len(shape) != len(size):
            return None
        cells = shape
    else:
        cells = tuple(shape[0] if at == axis else 1 for at in range(len(size)))
    block = tuple(
        blocked if blocked and at == axis else -(-n // c) for at, (n, c) in enumerate(zip(size, cells, strict=True))
    )
    return Scales("dequantize", integers, node, 1, scale, zero, size, cells, block)


def multiplier(node: ir.Node) -> Scales | None:
    """``Mul(Cast(q), s)`` or ``Mul(Sub(Cast(q), z), s)`` of stored integers."""
    if node.op_type != "Mul":
        return None
    for index, scale in enumerate(node.inputs):
        tensor, other = constant(scale), node.inputs[1 - index]
        if scale is None or tensor is None or other is None:
            continue
        zero = None
        inner = other.producer()
        if inner is not None and inner.op_type == "Sub" and constant(inner.inputs[1]) is not None:
            zero, first = inner.inputs[1], inner.inputs[0]
            inner = first.producer() if first is not None else None
        if inner is None or inner.op_type != "Cast":
            continue
        integers = inner.inputs[0]
        size = _integers(integers)
        if integers is None or size is None or len(tensor.shape) > len(size):
            continue
        shape = tensor_shape(tensor)
        cells = (1,) * (len(size) - len(shape)) + shape
        zero_tensor = constant(zero)
        of_zero = tensor_shape(zero_tensor) if zero_tensor is not None else ()
        if len(of_zero) > len(size):
            continue
        padded = (1,) * (len(size) - len(of_zero)) + of_zero
        if any(n not in {1, whole} for each in (cells, padded) for n, whole in zip(each, size, strict=True)):
            continue
        block = tuple(-(-n // c) for n, c in zip(size, cells, strict=True))
        return Scales("multiply", integers, node, index, scale, zero, size, cells, block)
    return None


def block_scales(node: ir.Node) -> Scales | None:
    """``MatMulNBits``: (d, k) packed in blocks along k."""
    integers, scale = node.inputs[1], node.inputs[2]
    tensor = constant(scale)
    if integers is None or scale is None or tensor is None or constant(integers) is None:
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        # g_idx assigns features to blocks one by one
        return None
    d, k, block = (node.attributes.get_int(name, 0) for name in ("N", "K", "block_size"))
    if not (d and k and block):
        return None
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    return Scales("blocks", integers, node, 2, scale, zero, (d, k), (d, -(-k // block)), (1, block))


def integer_product(
    node: ir.Node, integers: ir.Value, index: int, scale: ir.Value, zero: ir.Value | None
) -> Scales | None:
    """The scale that multiplies the result of an integer product with (k, d) ``integers``."""
    tensor, size = constant(scale), _integers(integers)
    if tensor is None or size is None or len(size) != 2 or tensor.size not in {1, size[1]}:
        return None
    cells = (1, int(tensor.size))
    return Scales("product", integers, node, index, scale, zero, size, cells, (size[0], -(-size[1] // cells[1])))


def dequantized_blocks(
    packed: Array, scales: Array, zero: Array | None, size: tuple[int, int] | tuple[int, ...], block: int, bits: int
) -> Float64:
    """``s ⊙ (q - z)`` of a MatMulNBits, (d, k): integers packed row by row, each block of a row with its own scale.

    ``zero``: packed like the integers, or plain floats; the middle of their range if ``None``.
    """
    d, k = size
    blocks = -(-k // block)
    q = _unpack(packed.reshape(d, -1), bits)[:, : blocks * block].astype(np.float64).reshape(d, blocks, block)
    if zero is None:
        z: Float64 = np.full((d, blocks), 2.0 ** (bits - 1))
    elif zero.dtype == np.uint8:
        z = _unpack(zero.reshape(d, -1), bits)[:, :blocks].astype(np.float64)
    else:
        z = zero.astype(np.float64).reshape(d, blocks)
    spread = (q - z[..., None]) * np.asarray(scales, dtype=np.float64).reshape(d, blocks)[..., None]
    return np.asarray(spread.reshape(d, -1)[:, :k])


def _integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of stored integers."""
    tensor = constant(value)
    if value is None or tensor is None or tensor.dtype.is_floating_point():
        return None
    return static_shape(value) or tensor_shape(tensor)


def _unpack(packed: Array, bits: int) -> Array:
    """(rows, bytes) → (rows, integers), the lowest bits first."""
    if bits == 8:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return spread.reshape(packed.shape[0], -1)
