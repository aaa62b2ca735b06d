"""Give nodes a lower floating-point type: their values, the weights that they read, and the casts at the border.

A value is cast at most once to a type in a graph (a branch that reads it from around it casts it itself, so that the
other branch pays nothing), right after it is made, and never from a cast.  A weight is rounded here, once, and never at
run time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from deployfa.graph.precision_numbers import rounded, rounded_tensor, stored
from deployfa.graph.precision_rules import IGNORED, Reasons
from deployfa.graph.precision_types import FLOAT, is_float
from deployfa.graph.views import tensor_shape

__all__ = ["lower"]


def lower(model: ir.Model, reasons: Reasons, low: ir.DataType) -> None:
    """Make every node of ``reasons.low`` one of ``low``, in place; the types of inputs and outputs of graphs stay.

    A finite number that the type cannot hold is stored as the largest that it can: -3.4e38 becomes -65504 and not minus
    infinity, which a softmax over nothing else would turn into NaN.  Only where an operator is forced: by itself none
    that reads such a number is low.
    """
    lowering = _Lowering(model, reasons, low)
    for node in reasons.low:
        lowering.retype(node)
    # what is around a branch first: a branch uses the casts that are there already
    for graph in list(lowering.around):
        for node in list(graph):
            lowering.feed(node, graph)
        lowering.answer(graph)
    lowering.clean()


class _Lowering:
    def __init__(self, model: ir.Model, reasons: Reasons, low: ir.DataType) -> None:
        self._model, self._reasons, self._low = model, reasons, low
        self._nodes = set(reasons.low)
        self._lowered: set[ir.Value] = set()
        self._made: dict[tuple[ir.Value, ir.DataType, ir.Graph], ir.Value] = {}
        self._weights: dict[ir.Value, ir.Value] = {}
        #: graph → the one around it
        self.around: dict[ir.Graph, ir.Graph | None] = {model.graph: None}
        self._names: set[str] = set()
        for node in model.graph.all_nodes():
            self._names.update(value.name or "" for value in node.outputs)
            for graph in _graphs(node):
                assert node.graph is not None  # it was found in one
                self.around[graph] = node.graph if isinstance(node.graph, ir.Graph) else model.graph
        for graph in self.around:
            self._names.update(value.name or "" for value in (*graph.inputs, *graph.initializers.values()))

    def retype(self, node: ir.Node) -> None:
        """What ``node`` makes, and what its attributes say of it."""
        slots = self._reasons.slots[node]
        assert slots is not None  # a node without a form in the type is kept
        for index in slots.outputs:
            # a fresh type: a clone shares its own with the original graph
            node.outputs[index].type = ir.TensorType(self._low)
            self._lowered.add(node.outputs[index])
        if node.op_type == "ConstantOfShape":
            fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
            node.attributes["value"] = ir.AttrTensor("value", rounded(fill, self._low))
        elif node.op_type == "DequantizeLinear" and "output_dtype" in node.attributes:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(self._low))
        elif node.op_type == "Attention" and not node.domain and "softmax_precision" not in node.attributes:
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", int(FLOAT))

    def feed(self, node: ir.Node, graph: ir.Graph) -> None:
        """Every floating-point input of ``node`` in the type that it takes."""
        if node.op_type in IGNORED:
            self._leave_out(node, graph)
            return
        slots = self._reasons.slots.get(node) if node in self._nodes else None
        for index, value in enumerate(node.inputs):
            if value is None or not (is_float(value) or value in self._lowered):
                continue
            wanted = self._low if slots is not None and index in slots.inputs else FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, self._as_type(value, wanted, graph))

    @staticmethod
    def _leave_out(node: ir.Node, graph: ir.Graph) -> None:
        """A cast to what its input has become."""
        source, made = node.inputs[0], node.outputs[0]
        if node.op_type == "Cast" and source is not None and source.dtype == made.dtype and not made.is_graph_output():
            made.replace_all_uses_with(source)
            graph.remove(node, safe=True)

    def answer(self, graph: ir.Graph) -> None:
        """Outputs keep their types and names."""
        for index, value in enumerate(list(graph.outputs)):
            if value not in self._lowered:
                continue
            whole = self._as_type(value, FLOAT, graph)
            if value.name and not whole.is_graph_output():
                name = value.name
                value.name, whole.name = self._free(f"{name}/{self._low.name.lower()}"), name
            graph.outputs[index] = whole

    def clean(self) -> None:
        """Leave out what nobody reads any more; a weight that is stored in the lower type only keeps its name."""
        for whole, lowered in self._weights.items():
            owner, name = whole.graph, whole.name
            if whole.uses() or whole.is_graph_output() or owner is None or name is None:
                continue
            del owner.initializers[name]
            lowered.name = name
        for graph in self.around:
            for node in reversed(list(graph)):
                unread = not node.outputs[0].uses() and not node.outputs[0].is_graph_output() if node.outputs else False
                if node.op_type == "Cast" and unread:
                    graph.remove(node, safe=True)

    def _as_type(self, value: ir.Value, wanted: ir.DataType, graph: ir.Graph) -> ir.Value:
        tensor = stored(value)
        if tensor is not None:
            # only ever asked for lower: what is stored is stored in float32
            if value not in self._weights:
                self._weights[value] = self._stored(value, tensor)
            return self._weights[value]
        maker = value.producer()
        if maker is not None and maker.op_type == "Cast" and maker.inputs[0] is not None:
            # from what was cast, and not from the cast
            value = maker.inputs[0]
            if value.dtype == wanted:
                return value
        scope: ir.Graph | None = graph
        while scope is not None:
            if (value, wanted, scope) in self._made:
                return self._made[value, wanted, scope]
            scope = self.around[scope]
        node = ir.node("Cast", [value], attributes={"to": int(wanted)})
        made = node.outputs[0]
        made.name = self._free(f"{value.name}/{wanted.name.lower()}")
        node.name = f"{made.name}/cast"
        made.type, made.shape = ir.TensorType(wanted), value.shape
        maker = value.producer()
        if maker is not None and maker.graph is graph:
            node.metadata_props.update(maker.metadata_props)
            graph.insert_after(maker, node)
        else:
            graph.insert_before(graph[0], node)
        self._made[value, wanted, graph] = made
        return made

    def _stored(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """A weight in the lower type, where the weight is."""
        tensor = rounded_tensor(tensor, self._low)
        tensor.name = self._free(f"{value.name}/{self._low.name.lower()}")
        made = ir.Value(
            name=tensor.name, const_value=tensor, shape=ir.Shape(tensor_shape(tensor)), type=ir.TensorType(self._low),
            metadata_props=dict(value.metadata_props),
        )  # fmt: skip
        assert value.graph is not None  # an initializer is one of a graph's
        value.graph.register_initializer(made)
        return made

    def _free(self, name: str) -> str:
        free, number = name, 1
        while free in self._names:
            free, number = f"{name}.{number}", number + 1
        self._names.add(free)
        return free


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
