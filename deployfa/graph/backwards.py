"""Which rule takes a change of a node's output to its inputs.  What is not listed blocks, by name."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from deployfa.graph import carry_products as products
from deployfa.graph import carry_views as moves
from deployfa.graph.carry import Blocked, Carried, Step

__all__ = ["backwards"]


def backwards(node: ir.Node, output: ir.Value, carried: Carried) -> list[Step]:
    """The inputs of ``node`` that can take the change instead of ``output``: one of them is enough.

    Raises ``Blocked`` with the reason if none can.
    """
    rule = _RULES.get((node.domain.removeprefix("ai.onnx"), node.op_type))
    if rule is None:
        if node.op_type in {"Add", "Sub", "Sum", "SkipLayerNormalization"}:
            raise Blocked("input is a sum (a residual), whose other part is not scaled")
        if "uantize" in node.op_type or "QLinear" in node.op_type:
            raise Blocked("input is quantised on the way, which a scale does not pass exactly")
        raise Blocked(f"input comes from {node.op_type}, which a scale does not pass")
    return rule(node, output, carried)


_RULES: dict[tuple[str, str], Callable[[ir.Node, ir.Value, Carried], list[Step]]] = {
    ("", "Attention"): products.attention,
    ("", "AveragePool"): products.pool,
    ("", "Cast"): moves.cast,
    ("", "Div"): products.product,
    ("", "Dropout"): moves.same,
    ("", "Expand"): moves.expand,
    ("", "Flatten"): moves.reshape,
    ("", "Gather"): moves.gather,
    ("", "GatherND"): moves.gather_nd,
    ("", "GlobalAveragePool"): products.pool,
    ("", "GlobalMaxPool"): products.positive,
    ("", "Identity"): moves.same,
    ("", "LeakyRelu"): products.positive,
    ("", "MatMul"): products.matmul,
    ("", "MaxPool"): products.positive,
    ("", "Mul"): products.product,
    ("", "Pad"): moves.pad,
    ("", "ReduceMean"): products.mean,
    ("", "ReduceSum"): products.mean,
    ("", "Relu"): products.positive,
    ("", "Reshape"): moves.reshape,
    ("", "Slice"): moves.slice_part,
    ("", "Split"): moves.split_part,
    ("", "Squeeze"): moves.reshape,
    ("", "Transpose"): moves.transpose,
    ("", "Unsqueeze"): moves.reshape,
    ("", "Where"): products.where,
    ("com.microsoft", "MultiHeadAttention"): products.multi_head,
}
