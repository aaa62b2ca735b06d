"""Spell a quantised layer out in floats: so that a side op can stand inside it, or other weights replace its own."""

from __future__ import annotations

import onnx_ir as ir

from deployfa.errors import PlanError
from deployfa.graph.layers import Use, read_layer
from deployfa.graph.tensors import add_initializer, cast_once
from deployfa.graph.views import constant

__all__ = ["in_floats", "spell_out"]


def spell_out(graph: ir.Graph, use: Use) -> Use:
    """An integer layer (QLinearMatMul, QGemm, QLinearConv) as its definition says: dequantize, the layer in floats,
    quantize.  The integers stay the same tensors."""
    spelled = read_layer(_expand(graph, use.node))
    assert spelled is not None  # what _expand makes is a layer
    return spelled


def in_floats(graph: ir.Graph, use: Use) -> Use:
    """``use`` with its weight as floats that may be written over; what it computes stays what it was, but for the
    rounding of its input that a dynamic quantisation did, and of its output that a static one did: the range of that
    was measured with the old weight and would cut off what another one answers.

    Raises ``PlanError`` if the answer goes on as integers.
    """
    use = _weight_in_floats(graph, use)
    # the product, and then the sum with the bias if that is quantised again
    while _unquantised(graph, use.output):
        again = read_layer(use.node)
        assert again is not None  # only what comes after it has changed
        use = again
    return use


def _weight_in_floats(graph: ir.Graph, use: Use) -> Use:
    if use.integer:
        use = spell_out(graph, use)
    if use.weight.scales is None or use.weight.scales.form == "dequantize" or use.weight.scales.form == "multiply":
        return use
    weight = cast_once(use.weight.numbers(), use.weight.dtype, use.weight.name)
    dense = weight.T if use.layout == "dk" else weight
    operand = add_initializer(graph, f"{use.weight.name}_float", dense)
    node = ir.node("MatMul", [use.input, operand], name=f"{use.node.name}/float")
    node.metadata_props.update(use.node.metadata_props)
    made = node.outputs[0]
    made.type, made.shape = use.product.type, use.product.shape
    bias = use.node.inputs[5] if use.node.op_type == "MatMulNBits" and len(use.node.inputs) > 5 else None
    maker = use.product.producer()
    assert maker is not None  # a layer's product is made by one of its nodes
    graph.insert_after(maker, node)
    if bias is not None:
        add = ir.node("Add", [made, bias], name=f"{use.node.name}/bias")
        add.metadata_props.update(use.node.metadata_props)
        add.outputs[0].type, add.outputs[0].shape = made.type, made.shape
        graph.insert_after(node, add)
        made = add.outputs[0]
    name, was_output = use.product.name, use.product.is_graph_output()
    use.product.replace_all_uses_with(made, replace_graph_outputs=True)
    if was_output:
        made.name, use.product.name = name, f"{name}_integer"
    spelled = read_layer(node)
    assert spelled is not None  # a MatMul with a stored weight is a layer
    return spelled


def _unquantised(graph: ir.Graph, value: ir.Value) -> bool:
    """Leave out the QuantizeLinear of ``value`` and the DequantizeLinear after it; ``False`` if there is none."""
    quantizers = [node for node in value.consumers() if node.op_type == "QuantizeLinear" and node.inputs[0] is value]
    for quantizer in quantizers:
        integers = quantizer.outputs[0]
        dequantizers = [use.node for use in integers.uses()]
        if integers.is_graph_output() or any(node.op_type != "DequantizeLinear" for node in dequantizers):
            raise PlanError(
                f"node '{quantizer.name}' quantises what a replaced module answers, in a range that fits the old one; "
                "quantise the base model with this module left out"
            )
        for node in dequantizers:
            result = node.outputs[0]
            name, was_output = result.name, result.is_graph_output()
            result.replace_all_uses_with(value, replace_graph_outputs=True)
            if was_output:
                value.name, result.name = name, value.name
            graph.remove(node, safe=True)
        graph.remove(quantizer, safe=True)
    return bool(quantizers)


def _expand(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """Spell an integer layer out as what its definition says: dequantize, the layer in floats, quantize.

    Returns the floating-point MatMul, Gemm or Conv.  The integers stay the same tensors.
    """
    inputs = list(node.inputs)
    conv, gemm = node.op_type == "QLinearConv", node.op_type == "QGemm"
    # the last: a QLinearMatMul may hold many matrices
    out_axis = 0 if conv or node.attributes.get_int("transB", 0) != 0 else -1
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
