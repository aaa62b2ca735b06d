"""Evaluate a graph in float64 without torch and without a runtime: the truth on a device.

``onnx.reference.ReferenceEvaluator`` runs every operator in numpy; with the graph's floats widened to float64 it gives
what exact arithmetic would, to about 1e-15, at the speed of numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.graph.evaluate_operators import operators
from deployfa.graph.evaluate_quantised import quantised_operators

__all__ = ["evaluate"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def evaluate(
    model: ir.Model, cases: Iterable[Mapping[str, Array]], *, dtype: Literal["float32", "float64"] = "float64"
) -> list[dict[str, Array]]:
    """Outputs by name for every case of feeds, computed in ``dtype``; ``model`` is not changed.

    ``float32`` computes every node in the types that the graph names: of a graph typed to float16 or bfloat16
    (``deployfa.graph.precision``), it rounds what goes from node to node as the graph says.

    Standard operators, and those that quantisers write: give it the graph before any fusion for a runtime.
    """
    from onnx.reference import ReferenceEvaluator

    widened = _in_memory(model.clone(), widen=dtype == "float64")
    evaluator = ReferenceEvaluator(ir.to_proto(widened), new_ops=[*operators(), *quantised_operators()])
    names = [value.name or "" for value in widened.graph.outputs]
    wanted = {value.name for value in widened.graph.inputs}
    results = []
    for feeds in cases:
        taken = {name: array for name, array in feeds.items() if name in wanted}
        if dtype == "float64":
            # numpy computes in the dtype of its operands: a float32 feed would keep what follows it in float32
            taken = {name: a.astype(np.float64) if _is_float(a) else a for name, a in taken.items()}
        outputs = evaluator.run(None, taken)
        results.append(dict(zip(names, (np.asarray(output) for output in outputs), strict=True)))
    return results


def _is_float(array: Array) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _in_memory(model: ir.Model, *, widen: bool) -> ir.Model:
    """Weights loaded (the evaluator reads no external data), floats as float64 if ``widen``."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None  # an initializer has one by definition
        array = np.array(value.const_value.numpy())
        if widen and value.dtype in _FLOATS:
            array, value.type = array.astype(np.float64), ir.TensorType(ir.DataType.DOUBLE)
        value.const_value = ir.tensor(array, name=value.name)
    if widen:
        for value in [*model.graph.inputs, *(o for node in model.graph.all_nodes() for o in node.outputs)]:
            if value.dtype in _FLOATS:
                # a fresh type: clones share theirs with the original
                value.type = ir.TensorType(ir.DataType.DOUBLE)
        for node in model.graph.all_nodes():
            _widen_attributes(node)
    return model


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in _FLOATS:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(tensor.numpy().astype(np.float64)))
        elif node.op_type == "Constant" and name in {"value_float", "value_floats"}:
            numbers = attribute.as_float() if name == "value_float" else attribute.as_floats()
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.asarray(numbers, dtype=np.float64)))
        elif name == "to" and ir.DataType(attribute.as_int()) in _FLOATS:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.DOUBLE))
