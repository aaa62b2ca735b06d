"""Which inputs and outputs of an operator may be float16 or bfloat16, what type a value has, and whether types agree.

The answers come from ONNX's own operator schemas (https://onnx.ai/onnx/operators/), which name each input by a type
variable and say what the variable may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx import defs
from onnx_ir.passes import common as passes

from deployfa.errors import GraphError
from deployfa.graph.layers import module_path

__all__ = ["CONTRIB", "FLOAT", "LOW", "Precision", "Slots", "check_typed", "described", "infer_types", "is_float"]

Precision = Literal["fp16", "bf16"]
LOW: Final[dict[Precision, ir.DataType]] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT: Final = ir.DataType.FLOAT
#: Operators of ONNX Runtime whose floats are all of one type: what its fusions write.
CONTRIB: Final = frozenset(
    {
        *("Attention", "BiasAdd", "BiasGelu", "BiasSplitGelu", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul"),
        *("Gelu", "GroupQueryAttention", "MatMulNBits", "MultiHeadAttention", "NhwcConv", "QuickGelu"),
        *("RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
        *("SkipSimplifiedLayerNormalization", "GroupNorm", "SkipGroupNorm", "EmbedLayerNormalization"),
    }
)
_STANDARD = {"", "ai.onnx"}
#: Below, a weight may say a shape or the sizes of a split.
_SMALL_BYTES = 1024
_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}


def is_float(value: ir.Value | None) -> bool:
    """Whether ``value`` is a float32 tensor."""
    return value is not None and value.dtype == FLOAT


def described(node: ir.Node) -> str:
    """``node 'n' (Add in encoder.layer.0)``."""
    path = module_path(node)
    return f"node '{node.name}' ({node.op_type}{f' in {path}' if path else ''})"


@dataclass(frozen=True)
class Slots:
    """The indices of a node's float32 inputs and outputs that can be of a lower type together."""

    inputs: frozenset[int]
    outputs: frozenset[int]

    @classmethod
    def of(cls, node: ir.Node, opsets: dict[str, int], low: ir.DataType) -> Slots | None:
        """``None`` if the operator has no such form in this opset, or none that is known here."""
        floats = [i for i, value in enumerate(node.inputs) if is_float(value)]
        made = [i for i, value in enumerate(node.outputs) if is_float(value)]
        if node.domain == "com.microsoft" and node.op_type in CONTRIB:
            return cls(frozenset(floats), frozenset(made))
        schema = _schema(node, opsets)
        if schema is None:
            return None
        able = [i for i in floats if _NAMES[low] in _formal(schema.inputs, i).types]
        variables = {_formal(schema.inputs, i).type_str for i in able}
        # these two say the type of their output in an attribute, or by their scale's
        by_attribute = node.op_type == "ConstantOfShape" or (node.op_type == "DequantizeLinear" and bool(able))
        results = [
            i
            for i in made
            if _NAMES[low] in _formal(schema.outputs, i).types
            and (by_attribute or _formal(schema.outputs, i).type_str in variables)
        ]
        if (made and not results) or not (able or results):
            return None
        return cls(frozenset(able), frozenset(results))


def infer_types(model: ir.Model) -> None:
    """Give every value that is read or answered a type, in place.

    Raises ``GraphError`` naming the first node whose output has none.
    """
    if any(True for _ in _untyped(model)):
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for node, output in _untyped(model):
        like = next(
            (v.type for v in node.inputs if v is not None and v.dtype is not None and v.dtype.is_floating_point()), None
        )
        if node.domain == "com.microsoft" and node.op_type in CONTRIB and output.index() == 0 and like is not None:
            output.type = like
    for node, output in _untyped(model):
        raise GraphError(
            f"{described(node)}: the type of its output '{output.name}' is unknown; "
            "run onnx.shape_inference on the graph, or export it again"
        )


def _untyped(model: ir.Model) -> Any:
    for node in model.graph.all_nodes():
        for output in node.outputs:
            if output.type is None and (output.uses() or output.is_graph_output()):
                yield node, output


def check_typed(model: ir.Model, *, source: ir.Model | None = None) -> None:
    """Hold every type in ``model`` against the operators' schemas: what a strongly typed runtime will do.

    A node's inputs and outputs of one type variable must be of one type, and ONNX's strict inference must find the
    types that the graph names; what it finds wrong in ``source`` too, the graph before it was typed, is no matter of
    types.  Raises ``GraphError`` naming the node.  ``model`` is not changed.
    """
    for node in model.graph.all_nodes():
        schema = _schema(node, model.graph.opset_imports)
        if schema is not None:
            _check_node(node, schema)
        elif node.domain == "com.microsoft" and node.op_type in CONTRIB:
            types = {
                v.dtype for v in node.inputs if v is not None and v.dtype is not None and v.dtype.is_floating_point()
            }
            if len(types) > 1:
                read = " and ".join(sorted(_spelt(each) for each in types))
                raise GraphError(f"{described(node)} reads {read}; it takes one floating-point type")
    fault = _inference_fault(model)
    if fault is not None and (source is None or _inference_fault(source) is None):
        raise GraphError(f"the typed graph contradicts itself ({fault}); report this graph")


def _inference_fault(model: ir.Model) -> str | None:
    try:
        onnx.shape_inference.infer_shapes(_types_alone(model), check_type=True, strict_mode=True)
    except Exception as error:  # each from C++, with a class of its own
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None


def _types_alone(model: ir.Model) -> onnx.ModelProto:
    """``model`` without the numbers of its large weights, which then are inputs, and without shapes: a fusion for a
    runtime may leave wrong ones, and they are not asked for."""
    bare = model.clone()
    for name, value in list(bare.graph.initializers.items()):
        if value.const_value is not None and value.const_value.nbytes > _SMALL_BYTES:
            del bare.graph.initializers[name]
            value.const_value = None
            if not value.is_graph_input():
                bare.graph.inputs.append(value)
    for node in bare.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    return ir.to_proto(bare)


def _check_node(node: ir.Node, schema: Any) -> None:
    bound: dict[str, tuple[str, ir.DataType]] = {}
    values = [(schema.inputs, i, v, "reads") for i, v in enumerate(node.inputs)]
    values += [(schema.outputs, i, v, "makes") for i, v in enumerate(node.outputs)]
    for formals, index, value, does in values:
        if value is None or value.dtype is None or not isinstance(value.type, ir.TensorType):
            continue
        formal = _formal(formals, index)
        name = _spelt(value.dtype)
        if formal.types and f"tensor({name})" not in formal.types:
            raise GraphError(f"{described(node)} {does} '{value.name}' as {name}, which its operator does not take")
        if str(formal.option).endswith("Variadic") and not formal.is_homogeneous:
            continue
        other, dtype = bound.setdefault(formal.type_str, (value.name or "", value.dtype))
        if dtype != value.dtype:
            raise GraphError(
                f"{described(node)} {does} '{value.name}' as {name} and '{other}' as {_spelt(dtype)}; "
                "they must be of one type"
            )


def _spelt(dtype: ir.DataType) -> str:
    return str(dtype.name).lower()


def _schema(node: ir.Node, opsets: dict[str, int]) -> Any:
    domain = "" if node.domain in _STANDARD else node.domain
    version = opsets.get(domain, opsets.get("ai.onnx", 0) if domain == "" else 0)
    if not version or not defs.has(node.op_type, domain):
        return None
    try:
        return defs.get_schema(node.op_type, version, domain)
    except defs.SchemaError:
        # the operator came later, or has gone
        return None


def _formal(formals: Sequence[Any], index: int) -> Any:
    """The last formal parameter stands for all that follow it."""
    return formals[min(index, len(formals) - 1)]
