"""Reference operators for quantised graphs, in the precision of their floats.

``onnx.reference`` has no MatMulNBits, which is ONNX Runtime's, and computes DynamicQuantizeLinear in float32 whatever
it is given, which a reference in float64 must not.  Sources: the ONNX page of DynamicQuantizeLinear, ONNX Runtime's
page of MatMulNBits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deployfa.edits import Array
from deployfa.graph.scales import dequantized_blocks

__all__ = ["quantised_operators"]


def quantised_operators() -> list[Any]:
    """Classes for ``ReferenceEvaluator(new_ops=…)``."""
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
            weight = dequantized_blocks(b, scales, zero_points, size, attributes["block_size"], attributes["bits"])
            product = a @ weight.T.astype(a.dtype)
            return (product if bias is None else product + bias,)

    return [DynamicQuantizeLinear, MatMulNBits]
