"""Reference operators for quantised graphs, in the precision of their floats.

``onnx.reference`` has no MatMulNBits and no QGemm, which are ONNX Runtime's, and computes DynamicQuantizeLinear in
float32 whatever it is given, which a reference in float64 must not.  Its QuantizeLinear and DequantizeLinear know no
opset before 19, which is what older exporters write, take large numbers through int32, and int32 through float32.
Sources: the ONNX pages of these three, ONNX Runtime's pages of MatMulNBits and QGemm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from deployfa.edits import Array
from deployfa.graph.scales import dequantized_blocks

__all__ = ["quantised_operators"]


def quantised_operators() -> list[Any]:
    """Classes for ``ReferenceEvaluator(new_ops=…)``."""
    from onnx import TensorProto, numpy_helper
    from onnx.helper import tensor_dtype_to_np_dtype
    from onnx.reference.op_run import OpRun

    class DynamicQuantizeLinear(OpRun):
        op_domain = ""

        def _run(self, x: Array) -> tuple[Array, Array, Array]:
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
            scale = np.asarray((high - low) / 255.0 or 1.0, dtype=x.dtype)
            zero = np.clip(np.rint(-low / scale), 0, 255).astype(np.uint8)
            return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8), scale, zero

    class MatMulNBits(OpRun):
        op_domain = "com.microsoft"

        def _run(
            self,
            a: Array,
            b: Array,
            scales: Array,
            zero_points: Array | None = None,
            g_idx: Array | None = None,
            bias: Array | None = None,
            **attributes: Any,
        ) -> tuple[Array]:
            if g_idx is not None and g_idx.size:
                raise NotImplementedError("MatMulNBits with g_idx")
            size = (attributes["N"], attributes["K"])
            bits = attributes.get("bits", 4)
            weight = dequantized_blocks(b, scales, zero_points, size, attributes["block_size"], bits)
            product = a @ weight.T.astype(a.dtype)
            return (product if bias is None else product + bias,)

    class QGemm(OpRun):
        op_domain = "com.microsoft"

        def _run(
            self,
            a: Array,
            a_scale: Array,
            a_zero: Array,
            b: Array,
            b_scale: Array,
            b_zero: Array,
            c: Array | None = None,
            y_scale: Array | None = None,
            y_zero: Array | None = None,
            **attributes: Any,
        ) -> tuple[Array]:
            left = a.astype(np.int64) - a_zero.astype(np.int64)
            # one zero point for each output lies along the rows of a transposed b
            transposed = attributes.get("transB", 0) != 0
            right = b.astype(np.int64) - b_zero.astype(np.int64).reshape((-1, 1) if transposed else (1, -1))
            total = (left.T if attributes.get("transA", 0) else left) @ (right.T if transposed else right)
            if c is not None:
                total = total + c.astype(np.int64)
            y: Array = attributes.get("alpha", 1.0) * a_scale * b_scale * total
            if y_scale is None:
                return (np.asarray(y, dtype=a_scale.dtype),)
            zero = np.zeros((), dtype=np.uint8) if y_zero is None else y_zero
            bounds = np.iinfo(zero.dtype)
            return (np.clip(np.rint(y / y_scale) + zero, bounds.min, bounds.max).astype(zero.dtype),)

    class DequantizeLinear(OpRun):
        op_domain = ""

        def _run(self, x: Array, scale: Array, zero: Array | None = None, **attributes: Any) -> tuple[Array]:
            # float64 holds every integer and every small float exactly
            q = x.astype(np.float64)
            if zero is not None:
                q = q - _spread(zero.astype(np.float64), x.shape, attributes)
            return (np.asarray(q * _spread(scale, x.shape, attributes)).astype(scale.dtype),)

    class QuantizeLinear(OpRun):
        op_domain = ""

        def _run(self, x: Array, scale: Array, zero: Array | None = None, **attributes: Any) -> tuple[Array]:
            if zero is not None:
                target = zero.dtype
            else:
                target = tensor_dtype_to_np_dtype(attributes.get("output_dtype", 0) or TensorProto.UINT8)
            with np.errstate(over="ignore"):  # a mask of -3e38 goes to the end of the range
                q = x / _spread(scale, x.shape, attributes)
            try:
                bounds: Any = ml_dtypes.iinfo(target)  # type: ignore[no-untyped-call]
            except ValueError:
                # a small float: rounded by its own rules
                return (numpy_helper.saturate_cast(q, dtype=target),)
            q = np.rint(q)
            if zero is not None:
                q = q + _spread(zero.astype(q.dtype), x.shape, attributes)
            return (np.clip(q, int(bounds.min), int(bounds.max)).astype(target),)

    return [DequantizeLinear, DynamicQuantizeLinear, MatMulNBits, QGemm, QuantizeLinear]


def _spread(numbers: Array, shape: tuple[int, ...], attributes: Mapping[str, Any]) -> Array:
    """A scale or a zero point as it broadcasts over ``shape``: one, one for each place of an axis, or one a block."""
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    if numbers.size == 1 and not block:
        return numbers.reshape(())
    if block:
        return np.asarray(numbers.take(np.arange(shape[axis]) // block, axis=axis))
    return numbers.reshape([-1 if at == axis % len(shape) else 1 for at in range(len(shape))])
