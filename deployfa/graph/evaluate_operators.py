"""Standard operators that ``onnx.reference`` computes slowly or wrongly.

Sources: the ONNX pages of MatMul, GatherElements and Conv.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from deployfa.edits import Array

__all__ = ["convolve", "operators"]


def operators() -> list[Any]:
    """Classes for ``ReferenceEvaluator(new_ops=…)``."""
    from onnx.reference.op_run import OpRun

    class MatMul(OpRun):
        """With the batch flattened into the rows: numpy multiplies (batch, sequence, k) by (k, d) one item of the batch
        at a time; as (batch * sequence, k) it is one call into BLAS, 7 to 20 times faster at the sizes of a sentence
        encoder.  Halves are summed in float32 and rounded once, as tensor cores do."""

        op_domain = ""

        def _run(self, a: Array, b: Array) -> tuple[Array]:
            if a.dtype.itemsize == 2:
                return (_product(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype),)
            return (_product(a, b),)

    class GatherElements(OpRun):
        """onnx's own fails on a negative axis, and where an axis has more than 64 elements."""

        op_domain = ""

        def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
            at = (axis or 0) % data.ndim
            cut = tuple(slice(None) if i == at else slice(0, n) for i, n in enumerate(indices.shape))
            return (np.take_along_axis(data[cut], indices, axis=at),)

    class Conv(OpRun):
        """onnx's own takes minutes for a picture of 224 x 224; see ``convolve``.  Halves as in MatMul."""

        op_domain = ""

        def _run(
            self,
            x: Array,
            w: Array,
            b: Array | None = None,
            auto_pad: str | None = None,
            dilations: Sequence[int] | None = None,
            group: int | None = None,
            kernel_shape: Sequence[int] | None = None,
            pads: Sequence[int] | None = None,
            strides: Sequence[int] | None = None,
        ) -> tuple[Array]:
            spatial = w.ndim - 2
            strides, dilations = strides or [1] * spatial, dilations or [1] * spatial
            pads = _pads(x.shape[2:], w.shape[2:], strides, dilations, pads, auto_pad or "NOTSET")
            wide = np.float32 if x.dtype.itemsize == 2 else x.dtype
            y = convolve(x.astype(wide), w.astype(wide), group or 1, strides, dilations, pads)
            if b is not None:
                y += b.astype(wide).reshape(-1, *([1] * spatial))
            return (y.astype(x.dtype, copy=False),)

    return [MatMul, GatherElements, Conv]


def convolve(
    x: Array, w: Array, groups: int, strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> Array:
    """``w``: (d, k / groups, *kernel), ``x``: (batch, k, *size), ``pads``: all beginnings, then all ends.

    One product for each place of the kernel, summed up: BLAS does the work, and nothing larger than x is made.
    """
    spatial = w.ndim - 2
    if any(pads):
        x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)])
    kernel, size = w.shape[2:], x.shape[2:]
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)]
    batch, inner = x.shape[0], x.shape[1] // groups
    y = np.zeros((batch, groups, w.shape[0] // groups, int(np.prod(out))), x.dtype)
    for place in product(*map(range, kernel)):
        cut = [
            slice(p * d, p * d + s * (n - 1) + 1, s) for p, d, s, n in zip(place, dilations, strides, out, strict=True)
        ]
        seen = x[(slice(None), slice(None), *cut)].reshape(batch, groups, inner, -1)
        at: Any = (slice(None), slice(None), *place)
        weight = w[at].reshape(groups, -1, inner)
        # one channel a group: a product of numbers, not of matrices
        y += weight * seen if inner == 1 else np.matmul(weight, seen)
    return y.reshape(batch, w.shape[0], *out)


def _pads(
    size: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[int]:
    if auto_pad == "NOTSET":
        return list(pads or [0] * (2 * len(kernel)))
    if auto_pad == "VALID":
        return [0] * (2 * len(kernel))
    whole = [
        max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
    ]
    less, more = [n // 2 for n in whole], [n - n // 2 for n in whole]
    return less + more if auto_pad == "SAME_UPPER" else more + less


def _product(a: Array, b: Array) -> Array:
    if a.ndim > 2 and b.ndim == 2:
        return np.asarray((a.reshape(-1, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[1]))
    return np.asarray(np.matmul(a, b))
