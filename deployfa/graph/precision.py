"""Type a float32 graph to float16 or bfloat16, so that a strongly typed runtime takes its precision from the graph.

TensorRT 10 can be told, and TensorRT 11 only knows, to compute every layer in the type that the graph names.  Which
nodes keep float32 and why is said in ``precision_rules``; inputs and outputs keep their types, an adapter's tensors
too, so that its files and a caller's feeds serve both graphs.

Our own code, because the two libraries that do this fall short here: ``onnxruntime.transformers.float16`` knows no
bfloat16, casts to float16 and back between two nodes that both stay, and stores a shared weight once, to cast it at run
time; NVIDIA's ``modelopt.onnx.autocast`` needs torch, and pins older versions of onnx and onnxruntime than ours.

ONNX Runtime's CPU provider has few kernels for float16 and none for most of bfloat16.  It computes float16 nodes in
float32 and leaves out the casts between them: its error is a lower bound, and a square that overflows within a chain is
not seen.  ``deployfa.graph.evaluate.evaluate(model, cases, dtype="float32")`` rounds after every node, in either type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from deployfa.errors import InputError
from deployfa.graph.precision_casts import lower
from deployfa.graph.precision_rules import Reasons
from deployfa.graph.precision_types import LOW, Precision, check_typed, infer_types, is_float

__all__ = ["Kept", "OperatorRow", "Precision", "Typed", "check_typed", "type_graph"]

#: bfloat16 came to convolutions, poolings and many activations in this opset; since 20, no operator but
#: GroupNormalization has changed its meaning.
_BFLOAT16_OPSET, _SAME_FROM = 22, 20


class Kept(msgspec.Struct, frozen=True):
    """``count`` nodes of one operator that stayed in float32, and why, the most frequent reason first."""

    count: int
    reason: str


class OperatorRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table: nodes of ``op_type`` in the lower type and in float32, and why the latter."""

    op_type: str
    low: int
    kept: int
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Typed:
    """A typed graph, and how many nodes of each operator with floats are of the lower type, and how many are not."""

    model: ir.Model
    precision: Precision
    low: Mapping[str, int]
    kept: Mapping[str, Kept]

    def rows(self) -> list[OperatorRow]:
        """The table, by operator; msgspec makes JSON of it."""
        none = Kept(0, "")
        rows = []
        for op_type in sorted({*self.low, *self.kept}):
            kept = self.kept.get(op_type, none)
            rows.append(OperatorRow(op_type=op_type, low=self.low.get(op_type, 0), kept=kept.count, reason=kept.reason))
        return rows

    def table(self) -> str:
        """The same for people, in Markdown."""
        lines = [f"| operator | {self.precision} | fp32 | why float32 |", "|---|---:|---:|---|"]
        lines += [f"| {row.op_type} | {row.low} | {row.kept} | {row.reason} |" for row in self.rows()]
        return "\n".join(lines)


def type_graph(model: ir.Model, precision: Precision, *, force_low: frozenset[str] = frozenset()) -> Typed:
    """A copy of ``model`` whose float32 nodes are float16 (``fp16``) or bfloat16 (``bf16``) where that is safe.

    force_low: operators that are made low although they would stay, for measuring what that costs: a finite number
    beyond the type's range is then stored as its largest.  ``model`` is not changed, and its functions are written out
    in the copy.  bfloat16 raises a graph of opset 20 or 21 to 22, the first in which convolutions have it.

    Raises ``GraphError`` naming the node whose type is unknown, or whose types contradict each other, and
    ``InputError`` for an unknown precision.
    """
    if precision not in LOW:
        raise InputError(f"no precision '{precision}' to type a graph to; use one of: {', '.join(LOW)}")
    low = LOW[precision]
    result = model.clone()
    if result.functions:
        passes.InlinePass()(result)
    infer_types(result)
    _tidy(result)
    if precision == "bf16":
        _raise_opset(result)
    nodes = list(result.graph.all_nodes())
    reasons = Reasons(nodes, result.graph.opset_imports, low, force_low)
    lowered = Counter(node.op_type for node in reasons.low)
    kept = {op_type: _kept(op_type, reasons) for op_type in {node.op_type for node in reasons.kept}}
    lower(result, reasons, low)
    check_typed(result, source=model)
    return Typed(result, precision, dict(sorted(lowered.items())), dict(sorted(kept.items())))


def _kept(op_type: str, reasons: Reasons) -> Kept:
    counted = Counter(reason for node, reason in reasons.kept.items() if node.op_type == op_type)
    return Kept(counted.total(), "; ".join(reason for reason, _ in counted.most_common()))


def _tidy(model: ir.Model) -> None:
    """Store constants as weights, say CastLike's type, and leave out casts that cast nothing."""
    for graph in list(model.graphs()):
        for node in list(graph):
            output = node.outputs[0] if node.outputs else None
            if node.op_type == "CastLike" and node.inputs[1] is not None and node.inputs[1].dtype is not None:
                _say_type(graph, node, node.inputs[1].dtype)
            elif output is None or output.is_graph_output():
                continue
            elif node.op_type == "Constant" and is_float(output):
                _store(graph, node)
            elif node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == output.dtype:
                output.replace_all_uses_with(node.inputs[0])
                graph.remove(node, safe=True)


def _store(graph: ir.Graph, node: ir.Node) -> None:
    (output,) = node.outputs
    ((name, attribute),) = node.attributes.items()
    array = attribute.as_tensor().numpy() if name == "value" else np.asarray(attribute.value, np.float32)
    tensor = ir.tensor(array, name=output.name)
    shape = ir.Shape(array.shape)
    value = ir.Value(name=output.name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    graph.register_initializer(value)


def _say_type(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    cast = ir.node("Cast", [node.inputs[0]], attributes={"to": int(dtype)}, name=node.name)
    cast.metadata_props.update(node.metadata_props)
    old, made = node.outputs[0], cast.outputs[0]
    made.type, made.shape = old.type, old.shape
    graph.insert_after(node, cast)
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    made.name = old.name


def _raise_opset(model: ir.Model) -> None:
    version = model.graph.opset_imports.get("", 0)
    grouped = any(node.op_type == "GroupNormalization" for node in model.graph.all_nodes())
    if _SAME_FROM <= version < _BFLOAT16_OPSET and not grouped:
        for graph in model.graphs():
            if "" in graph.opset_imports:
                graph.opset_imports[""] = _BFLOAT16_OPSET
