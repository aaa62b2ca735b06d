"""Which numbers a graph's inputs may hold: an input that picks rows of an embedding must name rows that there are.

Runtimes differ in what they do with others: ONNX Runtime's CPU provider refuses the whole batch, a GPU reads beyond the
table, and a graph that casts to int32 first takes ``2**32 + 5`` for 5.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["index_ranges"]

#: What hands the same numbers on.
_SAME = {"Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand"}
#: Fused lookups: operator → (index input, table input).
_FUSED = {"EmbedLayerNormalization": ((0, 2), (1, 4))}


def index_ranges(model: ir.Model) -> dict[str, int]:
    """Input → how many rows the smallest table has that it picks from: it may hold 0 to that, exclusive.

    An input that picks from no stored table is not in it.  Branches are looked into.  Reads no weights.
    """
    origin: dict[ir.Value, str] = {value: value.name or "" for value in model.graph.inputs}
    found: dict[str, int] = {}

    def picks(index: ir.Value | None, table: ir.Value | None, axis: int) -> None:
        name = origin.get(index) if index is not None else None
        shape = table.shape if table is not None and table.const_value is not None else None
        if name is None or shape is None or not -len(shape) <= axis < len(shape):
            return
        rows = shape[axis]
        if isinstance(rows, int):
            found[name] = min(rows, found.get(name, rows))

    for node in model.graph.all_nodes():
        inputs = node.inputs
        if node.op_type in _SAME and inputs and inputs[0] in origin:
            origin[node.outputs[0]] = origin[inputs[0]]
        elif node.op_type == "Gather" and node.domain == "":
            axis = node.attributes.get("axis")
            picks(inputs[1], inputs[0], axis.as_int() if axis is not None else 0)
        else:
            for index, table in _FUSED.get(node.op_type, ()):
                if len(inputs) > max(index, table):
                    picks(inputs[index], inputs[table], 0)
    return found
