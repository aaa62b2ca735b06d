"""ONNX Runtime's FusedMatMul moves the batch of an operand only if both operands have one rank, three or more.

The fusing libraries do not look: they also merge the Transpose before the head of a decoder, whose weight has two
dimensions, and the graph fails at its first run.  Those products are parted again.

Source: ``transBatchA`` in docs/ContribOperators.md of ONNX Runtime, and its core/providers/cpu/math/matmul_helper.h.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["part_products"]

_DOMAIN = "com.microsoft"


def part_products(model: ir.Model) -> int:
    """Write every FusedMatMul that cannot run as Transpose, MatMul and, for an alpha, Mul; returns how many were."""
    parted = 0
    for graph in model.graphs():
        for node in list(graph):
            if node.op_type == "FusedMatMul" and node.domain == _DOMAIN and _is_refused(node):
                _part(model.graph, graph, node)
                parted += 1
    return parted


def _is_refused(node: ir.Node) -> bool:
    """What is not known is left as it is."""
    ranks = [len(value.shape) for value in node.inputs[:2] if value is not None and value.shape is not None]
    moved = any(_flag(node, name) for name in ("transBatchA", "transBatchB"))
    return moved and len(ranks) == 2 and (ranks[0] != ranks[1] or ranks[0] < 3)


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _order(rank: int, *, batch: bool, last: bool) -> list[int]:
    """The permutation of ``transBatchX`` (the first dimension goes behind the batch), and then of ``transX``."""
    order = [*range(1, rank - 1), 0, rank - 1] if batch else list(range(rank))
    return [*order[:-2], order[-1], order[-2]] if last else order


def _part(top: ir.Graph, graph: ir.Graph | ir.Function, node: ir.Node) -> None:
    operands, new = [], []
    for value, side in zip(node.inputs[:2], "AB", strict=True):
        assert value is not None and value.shape is not None  # as _is_refused found
        rank = len(value.shape)
        order = _order(rank, batch=_flag(node, f"transBatch{side}"), last=_flag(node, f"trans{side}"))
        operand = value
        if order != list(range(rank)):
            new.append(ir.node("Transpose", [value], {"perm": order}))
            operand = new[-1].outputs[0]
            operand.type = value.type
        operands.append(operand)
    new.append(ir.node("MatMul", operands))
    alpha = node.attributes.get("alpha")
    if alpha is not None and alpha.as_float() != 1.0:
        factor = ir.tensor(alpha.as_float(), dtype=ir.DataType.FLOAT)
        scale = ir.Value(name=f"{node.name}/alpha", const_value=factor, type=ir.TensorType(factor.dtype))
        scale.shape = ir.Shape([])
        top.register_initializer(scale)
        product = new[-1].outputs[0]
        product.type = node.outputs[0].type
        new.append(ir.node("Mul", [product, scale]))
    old, result = node.outputs[0], new[-1].outputs[0]
    result.type, result.shape = old.type, old.shape
    for each in new:
        each.metadata_props.update(node.metadata_props)
    name = old.name
    graph.insert_before(node, new)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name
