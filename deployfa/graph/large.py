"""Fold a weight that is too large to copy about: in blocks of rows, read from its file and written when the graph is.

The result is a tensor that computes itself when it is saved and is forgotten after, so that a graph of many gigabytes
never has more than one of its changed weights in memory, once, in its own dtype; float64 only ever holds a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Edit, Float64
from deployfa.graph.tensors import cast_once
from deployfa.graph.views import constant, tensor_shape
from deployfa.graph.weights import Weight

__all__ = ["LARGE_BYTES", "fold_rows", "is_large", "passed_shift", "scale_rows"]

#: From here on a weight in an external file is folded in blocks.
LARGE_BYTES = 64 << 20
_BLOCK = 1 << 20


def is_large(weight: Weight) -> bool:
    """Whether ``weight`` is a matrix that lies, as the layer reads it, in a file, and is not small."""
    tensor = constant(weight.stored)
    return (
        isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
        and tensor.nbytes >= LARGE_BYTES
        and weight.scales is None
        and not weight.nodes
        and len(weight.shape) == 2
    )


def fold_rows(weight: Weight, edit: Edit, owner: str, *, rows_are_inputs: bool, alpha: float = 1.0) -> ir.LazyTensor:
    """``deployfa.edits.fold_matrix`` of a stored matrix, block by block.

    Stored as ``S = Wᵀ: (k, d)`` (``rows_are_inputs``): ``S' = (1+λ) ⊙ S + s Aᵀ (Bᵀ S) + (s'/α) A'ᵀ B'ᵀ``, where the
    (r, d) product ``Bᵀ S`` takes a pass of its own.  Stored as ``W: (d, k)``: ``W' = W ⊙ (1+λ) + s (W B) A + …``.
    All of it times ``1+λ'`` over the outputs, if there is a λ'.
    """
    source = _Source(weight, owner)
    scale = None if edit.lam is None else 1.0 + edit.lam.astype(np.float64)
    outer = None if edit.output_scale is None else 1.0 + edit.output_scale.astype(np.float64)
    low, out = edit.input_low_rank, edit.output_low_rank

    def by_inputs() -> Array:
        mixed: Float64 = np.zeros(())
        if low is not None:
            b = low.b.astype(np.float64)
            mixed = np.asarray(sum(b[at].T @ block for at, block in source.blocks()))

        def changed(at: slice, block: Float64) -> Float64:
            result = block if scale is None else block * scale[at, None]
            if low is not None:
                result = result + low.s * (low.a[:, at].astype(np.float64).T @ mixed)
            if out is not None:
                result = result + out.s / alpha * (out.a[:, at].astype(np.float64).T @ out.b.astype(np.float64).T)
            return result if outer is None else result * outer

        return source.assemble(changed)

    def by_outputs() -> Array:
        def changed(at: slice, block: Float64) -> Float64:
            result = block if scale is None else block * scale
            if low is not None:
                result = result + low.s * ((block @ low.b.astype(np.float64)) @ low.a.astype(np.float64))
            if out is not None:
                result = result + out.s / alpha * (out.b[at].astype(np.float64) @ out.a.astype(np.float64))
            return result if outer is None else result * outer[at, None]

        return source.assemble(changed)

    return source.lazily(by_inputs if rows_are_inputs else by_outputs)


def scale_rows(weight: Weight, factor: Float64, axis: int, owner: str) -> ir.LazyTensor:
    """A stored matrix times ``factor`` along ``axis``."""
    source = _Source(weight, owner)

    def changed(at: slice, block: Float64) -> Float64:
        return block * (factor[at, None] if axis == 0 else factor)

    return source.lazily(lambda: source.assemble(changed))


def passed_shift(weight: Weight, delta: Array, *, rows_are_inputs: bool) -> Float64:
    """``W δ``, (d,)."""
    source, shift = _Source(weight, weight.name), delta.astype(np.float64)
    if rows_are_inputs:
        return np.asarray(sum(shift[at] @ block for at, block in source.blocks()))
    return np.concatenate([block @ shift for _, block in source.blocks()])


class _Source:
    """A stored matrix as it is now: the value that holds it will hold the fold."""

    def __init__(self, weight: Weight, owner: str) -> None:
        tensor = constant(weight.stored)
        assert tensor is not None  # is_large has looked
        self._tensor, self._owner = tensor, owner

    def lazily(self, compute: Callable[[], Array]) -> ir.LazyTensor:
        """A tensor that is computed when it is written, each time anew."""
        dtype = self._tensor.dtype
        shape = ir.Shape(tensor_shape(self._tensor))
        return ir.LazyTensor(lambda: ir.tensor(compute(), dtype=dtype), dtype=dtype, shape=shape)

    def assemble(self, changed: Callable[[slice, Float64], Float64]) -> Array:
        result: Array = np.empty(tensor_shape(self._tensor), dtype=self._tensor.dtype.numpy())
        for at, block in self.blocks():
            result[at] = cast_once(changed(at, block), self._tensor.dtype, self._owner)
        return result

    def blocks(self) -> Iterator[tuple[slice, Float64]]:
        """(rows, their numbers in float64), read from the file and not mapped: mapped pages count as memory in use."""
        rows, *rest = tensor_shape(self._tensor)
        width = math.prod(rest)
        step = max(1, _BLOCK // width)
        bounds = [(start, min(rows, start + step)) for start in range(0, rows, step)]
        if not isinstance(self._tensor, ir.ExternalTensor):
            # a fold of a fold: the first is computed whole
            array = self._tensor.numpy()
            for start, stop in bounds:
                yield slice(start, stop), np.asarray(array[start:stop]).astype(np.float64)
            return
        dtype = self._tensor.dtype.numpy().newbyteorder("<")
        with open(self._tensor.path, "rb") as file:
            for start, stop in bounds:
                file.seek((self._tensor.offset or 0) + start * width * dtype.itemsize)
                data = file.read((stop - start) * width * dtype.itemsize)
                yield slice(start, stop), np.frombuffer(data, dtype=dtype).reshape(-1, *rest).astype(np.float64)
