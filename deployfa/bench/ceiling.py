"""The fastest that a matrix product goes here: one bare MatMul, timed in the same rounds as the contenders."""

from __future__ import annotations

from pathlib import Path

from deployfa.bench.contender import Contender, Shape

__all__ = ["IN_FEATURES", "LABEL", "OUT_FEATURES", "ceiling_contender", "ceiling_flops"]

LABEL = "bare MatMul"
IN_FEATURES = 384  # the widest product of a small encoder's layer: hidden size 384 into 4 x 384
OUT_FEATURES = 1536


def ceiling_contender(folder: Path, target: str) -> Contender:
    """Write ``y = x W`` for ``target`` into ``folder``; x: (batch, sequence, 384), W: (384, 1536), float32."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((IN_FEATURES, OUT_FEATURES)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "bare_matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", IN_FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", OUT_FEATURES])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = folder / "bare_matmul.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    return Contender(LABEL, graph=path, target=target)


def ceiling_flops(shape: Shape) -> int:
    """``2 m k n`` with m = batch * sequence."""
    return 2 * shape.batch * shape.sequence * IN_FEATURES * OUT_FEATURES
