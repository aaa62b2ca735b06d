"""Give a graph new constants without touching what others read.

``Model.clone`` shares tensors and copies values, so on a clone a value's constant may be replaced freely; a value that
other nodes read too is left to them, and the site gets its own copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.errors import EditError
from deployfa.graph.views import tensor_shape

__all__ = ["add_initializer", "cast_once", "drop_unused", "set_operand"]

_ON_THE_WAY = {
    *("Cast", "Constant", "DequantizeLinear", "DynamicQuantizeLinear", "Flatten", "Identity"),
    *("MatMulInteger", "MatMulNBits", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
}
_NUMPY = {
    ir.DataType.FLOAT: np.dtype(np.float32),
    ir.DataType.DOUBLE: np.dtype(np.float64),
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def cast_once(array: Array, dtype: ir.DataType | None, owner: str, *, remedy: str = "use --placement side-op") -> Array:
    """float64 → the graph's storage dtype, in one rounding; raises ``EditError`` if a value overflows it."""
    target = _NUMPY.get(dtype or ir.DataType.FLOAT)
    if target is None:
        raise EditError(f"site '{owner}': cannot store an edit as {dtype}; expected a floating-point graph")
    with np.errstate(over="ignore"):
        cast: Array = np.ascontiguousarray(array.astype(target)).reshape(array.shape)
    if not np.isfinite(cast.astype(np.float64)).all():
        if not np.isfinite(array).all():
            raise EditError(f"'{owner}': a value to store is NaN or infinite; the adapter's training diverged")
        raise EditError(f"site '{owner}': a value to store overflows {target.name}; {remedy}")
    return cast


def add_initializer(graph: ir.Graph, name: str, array: Array | ir.LazyTensor) -> ir.Value:
    """Register ``array`` under ``name``, or under the first free ``name.N``."""
    free, number = name, 1
    while free in graph.initializers:
        free, number = f"{name}.{number}", number + 1
    tensor = _tensor(array, free)
    shape = ir.Shape(tensor_shape(tensor))
    value = ir.Value(name=free, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def set_operand(
    graph: ir.Graph, nodes: Sequence[ir.Node], index: int, array: Array | ir.LazyTensor, *, name: str
) -> None:
    """Make ``array`` operand ``index`` of every node in ``nodes``.

    The old initializer is overwritten when nothing else reads it, else it stays and they get a copy.  A node that reads
    it at another input too (a BatchNormalization at its start, with β and the running mean one tensor of zeros) is
    another reader.
    """
    old = nodes[0].inputs[index] if index < len(nodes[0].inputs) else None
    if (
        old is not None
        and old.is_initializer()
        and not old.is_graph_output()
        and all(use.node in nodes and use.idx == index for use in old.uses())
    ):
        tensor = _tensor(array, old.name)
        # fresh shape and type objects: a clone shares its own with the original graph
        old.const_value, old.shape, old.type = tensor, ir.Shape(tensor_shape(tensor)), ir.TensorType(tensor.dtype)
        return
    value = add_initializer(graph, name, array)
    for node in nodes:
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)


def _tensor(array: Array | ir.LazyTensor, name: str | None) -> ir.TensorProtocol:
    if isinstance(array, ir.LazyTensor):
        array.name = name
        return array
    return ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)


def drop_unused(graph: ir.Graph) -> None:
    """Remove what a rewrite left unread: views and constants on the way to a weight, and initializers."""
    for node in reversed(graph):
        unread = all(not output.uses() and not output.is_graph_output() for output in node.outputs)
        if unread and node.op_type in _ON_THE_WAY:
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
