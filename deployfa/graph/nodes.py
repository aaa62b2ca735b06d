"""Append nodes to a graph in order, each with a readable name and the type and shape of its like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.graph.layers import Use
from deployfa.graph.sites import Site
from deployfa.graph.tensors import add_initializer, cast_once

__all__ = ["Nodes"]


class Nodes:
    """Builds the side op of one use of a site, next to where ``source`` is made, or after the node ``after``.

    ``names`` are those of the nodes built so far, on the whole graph: a runtime refuses two of one name.

    Nodes that share a part made for another site may stand before it: sort the graph when all are built.
    """

    def __init__(
        self,
        graph: ir.Graph,
        names: set[str],
        site: Site,
        use: Use,
        source: ir.Value,
        *,
        after: ir.Node | None = None,
    ) -> None:
        self._graph, self._names, self._site, self._use, self._source = graph, names, site, use, source
        self._anchor = after or source.producer()
        self._place = "input" if after is None else "output"

    @property
    def path(self) -> str:
        """The site's."""
        return self._site.path

    def per_channel(self, vector: Array) -> Array:
        """A vector in the shape that broadcasts over the op's input: (k,), or (k, 1, …) for a convolution."""
        spatial = len(self._use.weight.shape) - 2 if self._use.convolves else 0
        return vector.reshape(vector.shape[0], *([1] * spatial))

    def constant(self, name: str, array: Array) -> ir.Value:
        dtype = self._source.dtype or self._site.weight.dtype
        stored = cast_once(array, dtype, self._site.path, remedy="use a float32 base graph")
        return add_initializer(self._graph, f"{self._site.path}/{name}", stored)

    def op(self, op_type: str, inputs: Sequence[ir.Value], like: ir.Value, **attributes: object) -> ir.Value:
        """A node whose output has the dtype and shape of ``like``."""
        node = ir.node(op_type, list(inputs), attributes=attributes)  # type: ignore[arg-type]
        self._insert(node, [like])
        return node.outputs[0]

    def integers(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """A constant shape, or axes."""
        return add_initializer(self._graph, f"{self.path}/{name}", np.array(numbers, np.int64))

    def split(self, value: ir.Value, sizes: Sequence[int], *, axis: int = -1) -> list[ir.Value]:
        """``value`` cut along ``axis``."""
        equal = len(set(sizes)) == 1
        attributes: dict[str, object] = {"axis": axis}
        operands = [value]
        if not equal:
            lengths = np.asarray(sizes, dtype=np.int64)
            operands.append(add_initializer(self._graph, f"{self._site.path}/split", lengths))
        elif self._graph.opset_imports.get("", 18) >= 18:
            attributes["num_outputs"] = len(sizes)
        node = ir.node("Split", operands, attributes=attributes, num_outputs=len(sizes))  # type: ignore[arg-type]
        self._insert(node, [self.untold(value)] * len(sizes))
        return list(node.outputs)

    def quantize_again(self, value: ir.Value, like: ir.Node) -> ir.Node:
        """A DynamicQuantizeLinear of ``value``, as ``like`` is of another."""
        node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        self._insert(node, list(like.outputs))
        return node

    def replace(self, old: ir.Value, new: ir.Value, readers: Sequence[tuple[ir.Node, int]]) -> None:
        """Make ``new`` what ``readers`` read, and the graph's output if ``old`` was one."""
        for node, index in readers:
            node.replace_input_with(index, new)
        if old.is_graph_output():
            name = old.name
            self._graph.outputs[list(self._graph.outputs).index(old)] = new
            maker = new.producer()
            step = maker.op_type.lower() if maker is not None else "side_op"
            old.name, new.name = f"{name}_before_{step}", name

    @staticmethod
    def untold(source: ir.Value) -> ir.Value:
        """A value with the dtype of ``source`` and no shape: the runtime infers the (…, r) in between."""
        return ir.Value(type=source.type)

    def _insert(self, node: ir.Node, likes: Sequence[ir.Value]) -> None:
        stem, number = f"{self._site.path}/{self._place}_{node.op_type.lower()}", 0
        while f"{stem}_{number}" in self._names:
            number += 1
        node.name = f"{stem}_{number}"
        self._names.add(node.name)
        node.metadata_props["deployfa.site"] = self._site.path
        for output, like in zip(node.outputs, likes, strict=True):
            output.type, output.shape = like.type, like.shape
        if self._anchor is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(self._anchor, node)
        self._anchor = node
