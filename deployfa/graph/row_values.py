"""Where the numbers of a row come from: gathered from tables by adapter id, or straight from graph inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from deployfa.graph.nodes import Nodes
from deployfa.graph.tensors import add_initializer
from deployfa.tables import Layout
from deployfa.tables.layout import STRENGTH

__all__ = ["ADAPTERS", "STRENGTH", "RowValues", "SlotValues", "TableValues"]

#: The name of a table's first axis.
ADAPTERS = "adapters"


class RowValues(Protocol):
    """``batched``: whether every value has the batch as its first axis."""

    batched: bool

    def vector(self, part: str, site: str) -> ir.Value:
        """λ as 1 + tλ, λ' likewise, δ as tδ: (B, 1, k) if batched, else (k,)."""
        ...

    def tensor(self, nodes: Nodes, name: str) -> ir.Value:
        """A tensor of the row as the layout has it, after the axis of the batch if there is one."""
        ...

    def strength(self, rank: int) -> ir.Value:
        """t, ready to broadcast over ``rank`` axes."""
        ...

    def row_shape(self, nodes: Nodes, rest: Sequence[int]) -> ir.Value:
        """[B, *rest] as a tensor, for a Reshape."""
        ...


class SlotValues:
    """The tensors of one row as graph inputs."""

    batched = False

    def __init__(self, graph: ir.Graph, layout: Layout) -> None:
        self._graph = graph
        self._inputs = {name: _input(graph, name, shape) for name, shape in layout.shapes().items()}
        self._start = _Start(graph)
        self._strength = _input(graph, STRENGTH, (1,))
        self._vectors = _vectors(self._start, layout, self._inputs, self._strength)

    def vector(self, part: str, site: str) -> ir.Value:
        return self._vectors[part, site]

    def tensor(self, nodes: Nodes, name: str) -> ir.Value:
        return self._inputs[name]

    def strength(self, rank: int) -> ir.Value:
        return self._strength

    def row_shape(self, nodes: Nodes, rest: Sequence[int]) -> ir.Value:
        # 0 keeps the first axis: with one row for all, only a convolution's positions are joined
        return nodes.integers("rows", [0, *rest])


class TableValues:
    """Tables as graph inputs, (N, …), and the rows that ``ids`` names."""

    batched = True

    def __init__(self, graph: ir.Graph, layout: Layout, ids: ir.Value) -> None:
        self._graph, self._ids = graph, ids
        self._tables = {name: _input(graph, name, (ADAPTERS, *shape)) for name, shape in layout.shapes().items()}
        self._start = start = _Start(graph)
        given = _input(graph, STRENGTH, ("strengths",))
        self._strengths = {2: start.op("Unsqueeze", [given, start.integers([1])])}
        self._gathered = {
            vectors.name: start.op("Gather", [self._tables[vectors.name], ids], axis=0) for vectors in layout.vectors
        }
        self._vectors = _vectors(start, layout, self._gathered, self._strengths[2], unsqueeze=True)
        self._batch: ir.Value | None = None
        self._shapes: dict[tuple[int, ...], ir.Value] = {}

    def vector(self, part: str, site: str) -> ir.Value:
        return self._vectors[part, site]

    def tensor(self, nodes: Nodes, name: str) -> ir.Value:
        # beside its reader, not at the start: what was just gathered is still in the cache
        if name not in self._gathered:
            table = self._tables[name]
            self._gathered[name] = nodes.op("Gather", [table, self._ids], ir.Value(type=table.type), axis=0)
        return self._gathered[name]

    def strength(self, rank: int) -> ir.Value:
        if rank not in self._strengths:
            axes = self._start.integers(list(range(2, rank)))
            self._strengths[rank] = self._start.op("Unsqueeze", [self._strengths[2], axes])
        return self._strengths[rank]

    def row_shape(self, nodes: Nodes, rest: Sequence[int]) -> ir.Value:
        key = tuple(rest)
        if key not in self._shapes:
            if self._batch is None:
                self._batch = self._start.op("Shape", [self._ids], dtype=ir.DataType.INT64)
            parts = [self._batch, self._start.integers(list(rest))]
            self._shapes[key] = self._start.op("Concat", parts, dtype=ir.DataType.INT64, axis=0)
        return self._shapes[key]


def _vectors(
    start: _Start,
    layout: Layout,
    rows: dict[str, ir.Value],
    strength: ir.Value,
    *,
    unsqueeze: bool = False,
) -> dict[tuple[str, str], ir.Value]:
    """(part, site) → its numbers; strength and the 1 of ``1 + λ`` once for all sites."""
    found: dict[tuple[str, str], ir.Value] = {}
    for vectors in layout.vectors:
        value = start.op("Mul", [rows[vectors.name], strength])
        if vectors.part != "delta":
            value = start.op("Add", [value, start.one()])
        if unsqueeze:
            value = start.op("Unsqueeze", [value, start.integers([1])])
        sizes = [segment.stop - segment.start for segment in vectors.segments]
        parts = start.split(value, sizes)
        found |= {(vectors.part, s.site): part for s, part in zip(vectors.segments, parts, strict=True)}
    return found


def _input(graph: ir.Graph, name: str, shape: Sequence[int | str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


class _Start:
    """Nodes at the start of a graph, before any site."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._first, self._number = graph, graph[0], 0
        self._constants: dict[tuple[int, ...], ir.Value] = {}
        self._one: ir.Value | None = None

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        outputs: int = 1,
        **attributes: object,
    ) -> ir.Value:
        return self._add(op_type, inputs, dtype, outputs, attributes)[0]

    def split(self, value: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
        if len(sizes) == 1:
            return [value]
        return self._add("Split", [value, self.integers(sizes)], ir.DataType.FLOAT, len(sizes), {"axis": -1})

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        key = tuple(numbers)
        if key not in self._constants:
            self._constants[key] = add_initializer(self._graph, "adapter/integers", np.array(key, np.int64))
        return self._constants[key]

    def one(self) -> ir.Value:
        if self._one is None:
            self._one = add_initializer(self._graph, "adapter/one", np.ones((), np.float32))
        return self._one

    def _add(
        self, op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType, outputs: int, attributes: dict[str, object]
    ) -> Sequence[ir.Value]:
        node = ir.node(op_type, list(inputs), attributes=attributes, num_outputs=outputs)  # type: ignore[arg-type]
        node.name = f"adapter/{op_type.lower()}_{self._number}"
        self._number += 1
        for output in node.outputs:
            output.type = ir.TensorType(dtype)
        self._graph.insert_before(self._first, node)
        return node.outputs
