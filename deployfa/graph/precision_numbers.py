"""Stored numbers in float16 or bfloat16: which of them do not fit, and the nearest that does.

float16 reaches from 6.1e-5 (6e-8 with fewer digits) to 65504; bfloat16 has float32's exponents, yet its largest number
is below float32's: the -3.4028e38 of a mask would become minus infinity in either.
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.graph.large import LARGE_BYTES
from deployfa.graph.views import read

__all__ = ["Fault", "judge", "judge_scale", "rounded", "rounded_tensor", "stored"]

Fault = Literal["large", "small"]


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer; ``None`` for one that is a graph input as well, whose value can change."""
    return None if value is None or value.is_graph_input() else value.const_value


def judge(array: Array, low: ir.DataType) -> Fault | None:
    """``large``: a finite number would become infinite.  ``small``: a number alone would become zero."""
    if not array.size:
        return None
    finite = array if np.isfinite(array).all() else array[np.isfinite(array)]
    if not np.isfinite(_cast(np.array([finite.min(initial=0), finite.max(initial=0)]), low)).all():
        return "large"
    return "small" if array.size == 1 and array.any() and not _cast(array, low).any() else None


def judge_scale(array: Array, low: ir.DataType) -> Fault | None:
    """``small``: a quantiser's scale would keep fewer digits than the type has, for all that it scales."""
    smallest = float(np.abs(array.astype(np.float64)).min(initial=np.inf))
    return "small" if 0 < smallest < _limit(low, "smallest_normal") else None


def rounded(array: Array, low: ir.DataType) -> ir.TensorProtocol:
    """To the nearest number of ``low``; beyond its largest, the largest.  Infinity stays, and so does NaN."""
    target = low.numpy()
    with np.errstate(over="ignore"):
        cast = array.astype(target)
    lost = np.isfinite(array) & ~np.isfinite(cast.astype(np.float32))
    if lost.any():
        cast = np.where(lost, np.copysign(_limit(low, "max"), array), array).astype(target)
    return ir.Tensor(np.ascontiguousarray(cast).reshape(array.shape), dtype=low)


def rounded_tensor(tensor: ir.TensorProtocol, low: ir.DataType) -> ir.TensorProtocol:
    """A large weight that lies in a file is rounded when it is written, and then forgotten."""
    if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor) and tensor.nbytes >= LARGE_BYTES:
        return ir.LazyTensor(
            lambda: rounded(read(tensor), low), dtype=low, shape=ir.Shape(tensor.shape.numpy()), cache=False
        )
    return rounded(read(tensor), low)


def _limit(low: ir.DataType, which: Literal["max", "smallest_normal"]) -> float:
    return float(getattr(ml_dtypes.finfo(low.numpy()), which))  # type: ignore[no-untyped-call]


def _cast(array: Array, low: ir.DataType) -> Array:
    with np.errstate(over="ignore"):
        return array.astype(low.numpy()).astype(np.float32)
