"""What must hold of every typed graph, whatever was in it."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir

from deployfa.graph.precision import check_typed, type_graph

LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def typed(model, precision="fp16", *, full=True, **options):
    """``type_graph``, its result held against the rules; ``full``: by ONNX's full check too."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    made = type_graph(model, precision, **options)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before, "the caller's model is as it was"
    check_typed(made.model, source=model)
    if full:
        inside = ir.external_data.load_to_model(made.model.clone())
        onnx.checker.check_model(ir.to_proto(inside), full_check=True)
    for graph in (made.model.graph, *made.model.graph.subgraphs()):
        _casts(graph)
    _ends(model, made.model)
    _weights(model, made.model, LOW[precision])
    return made


def _casts(graph):
    seen = Counter()
    for node in graph:
        if node.op_type == "Cast":
            source = node.inputs[0]
            maker = source.producer()
            assert maker is None or maker.op_type != "Cast" or maker.inputs[0].dtype.is_integer(), "a cast of a cast"
            assert not source.is_initializer() or source.is_graph_input(), "a weight is cast at run time"
            assert source.dtype != node.outputs[0].dtype, "a cast to the same type"
            seen[source, node.outputs[0].dtype] += 1
    assert not [value for value, count in seen.items() if count > 1], "a value is cast twice"


def _ends(before, after):
    graphs = zip(before.graphs(), after.graphs(), strict=True)
    for one, other in graphs:
        for ends in ("inputs", "outputs"):
            mine, its = ([(v.name, v.dtype) for v in getattr(graph, ends)] for graph in (one, other))
            assert mine == its


def _weights(before, after, low):
    unread = {value.name for graph in before.graphs() for value in graph.initializers.values() if not value.uses()}
    stored = Counter()
    for graph in after.graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            assert (name, tensor.dtype) == (value.name, value.dtype)
            if tensor.dtype in {low, ir.DataType.FLOAT} and not value.is_graph_input():
                assert value.uses() or value.is_graph_output() or name in unread, f"nobody reads '{name}'"
                stored[key(tensor, low)] += 1
    originals = Counter()
    for graph in (*before.graphs(), *(function.graph for function in before.functions.values())):
        for node in graph:
            if node.op_type == "Constant" and "value" in node.attributes:
                originals.update(both(node.attributes["value"].as_tensor().numpy(), low))
            elif node.op_type == "Constant" and "value_float" in node.attributes:
                originals.update(both(np.float32(node.attributes["value_float"].as_float()), low))
        for value in graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT:
                originals.update(both(value.const_value.numpy(), low))
    assert not stored - originals, "something is stored that the graph did not have, or twice"


def both(array, low):
    with np.errstate(over="ignore"):
        return [key(ir.tensor(np.asarray(each)), low) for each in (array, array.astype(low.numpy()))]


def key(tensor, low):
    """Numbers and type: a float16 or bfloat16 that had to be clamped counts as the infinity that it was saved from."""
    array = tensor.numpy()
    if tensor.dtype == low:
        with np.errstate(over="ignore"):
            wide = array.astype(np.float32)
        largest = {"FLOAT16": 65504.0, "BFLOAT16": 3.3895314e38}[low.name]
        array = np.where(np.abs(wide) >= largest, np.copysign(np.inf, wide), wide)
    return tensor.dtype, array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def nodes(made, op_type):
    return [node for node in made.model.graph.all_nodes() if node.op_type == op_type]


def types(made, op_type):
    """The types of what the nodes of one operator make, in order."""
    return [node.outputs[0].dtype.name for node in nodes(made, op_type)]
