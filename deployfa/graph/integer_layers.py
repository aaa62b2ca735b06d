"""Layers whose product is computed from integers: how x becomes integers, and where W's scales stand."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from deployfa.graph.scales import Scales, block_scales, integer_product
from deployfa.graph.views import constant, tensor_shape
from deployfa.graph.weights import Weight

__all__ = ["Dynamic", "Product", "blocks_weight", "dynamic_product", "integer_operands"]


@dataclass(frozen=True, eq=False)
class Dynamic:
    """x is quantised at run time by ``quantizer`` (DynamicQuantizeLinear).

    ``reads``: (node, input index, output of the quantizer) for everything by which the layer reads it.
    """

    quantizer: ir.Node
    reads: tuple[tuple[ir.Node, int, int], ...]


@dataclass(frozen=True, eq=False)
class Product:
    """A MatMulInteger with the Cast and the Mul that make its result a floating-point one."""

    weight: Weight
    dynamic: Dynamic
    result: ir.Value


def blocks_weight(node: ir.Node) -> Weight | None:
    """The (d, k) weight of a MatMulNBits."""
    scales = block_scales(node) if len(node.inputs) > 2 else None
    if scales is None:
        return None
    return Weight(scales.integers, scales.integers, scales.size, scales=scales)


def dynamic_product(node: ir.Node) -> Product | None:
    """``Mul(Cast(MatMulInteger(q, Q, z, Z)), Mul(s, S))`` with q, s, z from a DynamicQuantizeLinear of x.

    The form that ONNX Runtime's dynamic quantisation writes; ``None`` for any other.
    """
    q, weight = node.inputs[0], node.inputs[1]
    quantizer = q.producer() if q is not None else None
    if quantizer is None or quantizer.op_type != "DynamicQuantizeLinear" or weight is None:
        return None
    cast = _only_reader(node.outputs[0], "Cast")
    mul = _only_reader(cast.outputs[0], "Mul") if cast is not None else None
    if cast is None or mul is None:
        return None
    factor = mul.inputs[1] if mul.inputs[0] is cast.outputs[0] else mul.inputs[0]
    scale_mul = factor.producer() if factor is not None else None
    if scale_mul is None or scale_mul.op_type != "Mul" or len(list(scale_mul.outputs[0].uses())) != 1:
        return None
    for index, stored in enumerate(scale_mul.inputs):
        if scale_mul.inputs[1 - index] is quantizer.outputs[1] and stored is not None and constant(stored) is not None:
            zero = node.inputs[3] if len(node.inputs) > 3 else None
            scales = integer_product(scale_mul, weight, index, stored, zero)
            if scales is None:
                return None
            reads = [(node, 0, 0), (scale_mul, 1 - index, 1)]
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                if node.inputs[2] is not quantizer.outputs[2]:
                    return None
                reads.append((node, 2, 2))
            found = Weight(weight, weight, scales.size, scales=scales)
            return Product(found, Dynamic(quantizer, tuple(reads)), mul.outputs[0])
    return None


def integer_operands(node: ir.Node) -> Weight | None:
    """The weight of a QLinearMatMul, QGemm or QLinearConv: input 3, its scale and zero point after it."""
    if len(node.inputs) < 6:
        return None
    integers, scale, zero = node.inputs[3:6]
    tensor, scale_tensor = constant(integers), constant(scale)
    if integers is None or scale is None or tensor is None or scale_tensor is None or len(tensor.shape) < 2:
        return None
    size = tensor_shape(tensor)
    # one scale for the tensor, or one for each output
    conv = node.op_type == "QLinearConv"
    out = 0 if conv or node.attributes.get_int("transB", 0) != 0 else len(size) - 1
    if scale_tensor.size not in {1, size[out]}:
        return None
    cells = tuple(int(scale_tensor.size) if at == out else 1 for at in range(len(size)))
    block = tuple(-(-n // c) for n, c in zip(size, cells, strict=True))
    scales = Scales("dequantize", integers, node, 4, scale, zero, size, cells, block)
    return Weight(integers, integers, size, scales=scales)


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = list(value.uses())
    if len(readers) != 1 or readers[0].node.op_type != op_type or value.is_graph_output():
        return None
    return readers[0].node
