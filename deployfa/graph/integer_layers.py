"""Layers whose product is computed from integers: how x becomes integers, and where W's scales stand."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from deployfa.errors import PlanError
from deployfa.graph.scales import Scales, block_scales, integer_product
from deployfa.graph.tensors import add_initializer, cast_once
from deployfa.graph.views import constant, tensor_shape
from deployfa.graph.weights import Weight

__all__ = ["Dynamic", "Product", "blocks_weight", "dynamic_product", "expand", "integer_operands"]


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


def expand(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """Spell an integer layer out as what its definition says: dequantize, the layer in floats, quantize.

    Returns the floating-point MatMul, Gemm or Conv.  The integers stay the same tensors.
    """
    inputs = list(node.inputs)
    conv, gemm = node.op_type == "QLinearConv", node.op_type == "QGemm"
    out_axis = 0 if conv or node.attributes.get_int("transB", 0) != 0 else 1
    float_type = ir.TensorType(_scale_dtype(inputs[1]))
    built: list[ir.Node] = []

    def add(op_type: str, operands: list[ir.Value | None], attributes: dict[str, object], type_: object) -> ir.Value:
        made = ir.node(op_type, operands, attributes=attributes)  # type: ignore[arg-type]
        made.name = f"{node.name}/{op_type.lower()}_{len(built)}"
        made.metadata_props.update(node.metadata_props)
        made.outputs[0].type = type_  # type: ignore[assignment]
        built.append(made)
        return made.outputs[0]

    x = add("DequantizeLinear", inputs[0:3], {}, float_type)
    x.shape = inputs[0].shape if inputs[0] is not None else None
    w = add("DequantizeLinear", inputs[3:6], {"axis": out_axis}, float_type)
    inputs += [None] * (9 - len(inputs))
    bias = inputs[8] if conv else inputs[6] if gemm else None
    operands: list[ir.Value | None] = [x, w]
    if bias is not None:
        operands.append(add("DequantizeLinear", [bias, _bias_scale(graph, node)], {"axis": 0}, float_type))
    op_type = "Conv" if conv else "Gemm" if gemm else "MatMul"
    y = add(op_type, operands, dict(node.attributes) if conv or gemm else {}, float_type)
    layer, old = built[-1], node.outputs[0]
    y.shape = old.shape
    out_scale, out_zero = inputs[7:9] if gemm else inputs[6:8]
    if out_scale is not None:
        result = add("QuantizeLinear", [y, out_scale, out_zero], {}, old.type)
        result.shape = old.shape
    else:
        result = y
    for made in built:
        graph.insert_before(node, made)
    name = old.name
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name
    return layer


def _bias_scale(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """An integer bias counts in units of (α) x_scale w_scale."""
    x_scale, w_scale = constant(node.inputs[1]), constant(node.inputs[4])
    if x_scale is None or w_scale is None:
        raise PlanError(
            f"node '{node.name}' has a bias whose scale is computed in the graph; quantise with QDQ instead"
        )
    product = node.attributes.get_float("alpha", 1.0) * x_scale.numpy().astype("float64") * w_scale.numpy()
    scale = cast_once(product.reshape(-1) if product.size > 1 else product.reshape(()), x_scale.dtype, node.name or "")
    return add_initializer(graph, f"{node.name}/bias_scale", scale)


def _scale_dtype(value: ir.Value | None) -> ir.DataType:
    tensor = constant(value)
    return tensor.dtype if tensor is not None else (value.dtype if value is not None else None) or ir.DataType.FLOAT
