"""Side ops that read a row of adapter tensors at run time: slots, one row for the whole batch, and tables, a row each.

A *table* graph has the inputs ``adapter_ids`` (batch,), int64, and every tensor of the layout stacked over N adapters;
row b of the batch computes with row ``adapter_ids[b]`` of each::

    T_b(x) = (1 + t_b λ[i_b]) ⊙ x + t_b (x A[i_b]) B[i_b] + t_b δ[i_b]           i_b: adapter, t_b: strength

A *slot* graph has the tensors of one row as inputs, without the axis N and without a Gather.  Both have
``adapter_strength``, t: (batch,) or (1,), which scales λ, B, δ and λ'; heads have no in-between and stay.

Everything is a standard ONNX operator, and no operator but Gather sees two rows of a batch: rows cannot leak.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from deployfa.errors import PlanError
from deployfa.graph.layers import Use
from deployfa.graph.nodes import Nodes
from deployfa.graph.resize import downstream
from deployfa.graph.row_values import STRENGTH, RowValues, SlotValues, TableValues
from deployfa.graph.sites import Site, find_sites
from deployfa.graph.tensors import drop_unused
from deployfa.tables import Head, Layout, LowRanks

__all__ = ["ADAPTER_IDS", "STRENGTH", "add_slots", "add_tables"]

ADAPTER_IDS = "adapter_ids"


def add_tables(model: ir.Model, layout: Layout) -> ir.Model:
    """A clone of ``model`` in which every row of a batch runs its own adapter; the tables are graph inputs.

    Raises ``PlanError`` where a site's rows cannot be told apart.
    """
    result = model.clone()
    batch = _batch_name(result.graph)
    ids = ir.Value(name=ADAPTER_IDS, shape=ir.Shape([batch]), type=ir.TensorType(ir.DataType.INT64))
    result.graph.inputs.append(ids)
    return _add(result, layout, TableValues(result.graph, layout, ids), batch)


def add_slots(model: ir.Model, layout: Layout) -> ir.Model:
    """A clone of ``model`` whose adapter is one row of inputs, the same for the whole batch."""
    result = model.clone()
    # which axis is the batch, nothing asks that has one row for all
    return _add(result, layout, SlotValues(result.graph, layout), "")


def _add(result: ir.Model, layout: Layout, values: RowValues, batch: str) -> ir.Model:
    graph = result.graph
    sites = find_sites(result)
    ops = _RowOps(graph, layout, values, batch)
    for path in layout.sites():
        for use in sites[path].uses:
            ops.place(sites[path], use)
    graph.sort()
    drop_unused(graph)
    return result


def _batch_name(graph: ir.Graph) -> str:
    """The name of the dimension that all inputs share as their first."""
    for value in graph.inputs:
        first = value.shape[0] if value.shape is not None and len(value.shape) else None
        if isinstance(first, ir.SymbolicDim) and first.value is not None:
            return str(first.value)
    raise PlanError("the first axis of the graph's inputs has a fixed size: it has no batch to mix adapters in")


@dataclass(eq=False)
class _RowOps:
    graph: ir.Graph
    layout: Layout
    values: RowValues
    batch: str
    names: set[str] = field(default_factory=set)
    _products: dict[tuple[int, str], list[ir.Value]] = field(default_factory=dict)
    _rows_of: dict[int, ir.Value] = field(default_factory=dict)

    def place(self, site: Site, use: Use) -> None:
        """All parts that the layout has for ``site``, around one ``use`` of it."""
        head = next((head for head in self.layout.heads if head.site == site.path), None)
        if head is not None:
            self._replace_head(site, use, head)
            return
        source = use.input
        lows = {low.where: low for low in self.layout.low_ranks if site.path in low.sites}
        vectors: set[str] = {v.part for v in self.layout.vectors if any(s.site == site.path for s in v.segments)}
        # the product of the raw input first: what follows replaces what the layer reads
        after = self._low_rank(site, use, source, lows["output"]) if "output" in lows else None
        changed = self._transformed(site, use, source, vectors, lows.get("input"))
        product = use.product
        if after is not None:
            # between the layer and its bias, so that a bias fusion after it still matches
            nodes = self._nodes(site, use, product, after=product.producer())
            readers = [(node, index) for node, index in product.uses()]
            total = nodes.op("Add", [product, after], product)
            nodes.replace(product, total, readers)
            product = total
        if "out_lambda" in vectors:
            separate = use.bias_node is not None and use.bias_node is not use.node
            self._scale_output(site, use, use.bias_node.outputs[0] if separate and use.bias_node else product)
        if changed is not source:
            use.node.replace_input_with(0, changed)

    def _transformed(self, site: Site, use: Use, source: ir.Value, vectors: set[str], low: LowRanks | None) -> ir.Value:
        """``T(x)``, each row its own."""
        if not vectors & {"lambda", "delta"} and low is None:
            return source
        nodes = self._nodes(site, use, source)
        rows, back = self._as_rows(nodes, use, source)
        result = rows
        if "lambda" in vectors:
            result = nodes.op("Mul", [result, self._vector(nodes, use, "lambda", joined=back)], rows)
        if low is not None:
            result = nodes.op("Add", [result, self._low_rank_rows(nodes, site, use, rows, low)], rows)
        if "delta" in vectors:
            result = nodes.op("Add", [result, self._vector(nodes, use, "delta", joined=back)], rows)
        return self._from_rows(nodes, use, result, back, source)

    def _low_rank(self, site: Site, use: Use, source: ir.Value, low: LowRanks) -> ir.Value:
        """``(x A) B`` in the shape of the layer's output."""
        nodes = self._nodes(site, use, source)
        rows, back = self._as_rows(nodes, use, source)
        added = self._low_rank_rows(nodes, site, use, rows, low)
        return self._from_rows(nodes, use, added, back, use.product)

    def _low_rank_rows(self, nodes: Nodes, site: Site, use: Use, rows: ir.Value, low: LowRanks) -> ir.Value:
        """(B, n, k) → (B, n, width); of a convolution (B, k, n) → (B, width, n).  One product with all the A's."""
        key = (id(rows), low.a_name)
        if key not in self._products:
            matrix = self.values.tensor(nodes, low.a_name)
            product = self._product(nodes, use, rows, matrix)
            product = nodes.op("Mul", [product, self.values.strength(3)], nodes.untold(rows))
            axis = 1 if use.convolves else -1
            sizes = [low.rank] * len(low.sites)
            self._products[key] = nodes.split(product, sizes, axis=axis) if len(sizes) > 1 else [product]
        inner = self._products[key][low.sites.index(site.path)]
        return self._product(nodes, use, inner, self.values.tensor(nodes, low.b_name(site.path)))

    def _product(self, nodes: Nodes, use: Use, rows: ir.Value, matrix: ir.Value) -> ir.Value:
        """``x M`` row by row; for a convolution ``Mᵀ x``, whose features lie before its positions."""
        if not use.convolves:
            return nodes.op("MatMul", [rows, matrix], nodes.untold(rows))
        perm = [0, 2, 1] if self.values.batched else [1, 0]
        turned = nodes.op("Transpose", [matrix], nodes.untold(matrix), perm=perm)
        return nodes.op("MatMul", [turned, rows], nodes.untold(rows))

    def _scale_output(self, site: Site, use: Use, output: ir.Value) -> None:
        """``(1 + λ') ⊙ y``, after everything else that makes y."""
        readers = [(node, index) for node, index in output.uses()]
        nodes = self._nodes(site, use, output, after=output.producer())
        rows, back = self._as_rows(nodes, use, output)
        scaled = nodes.op("Mul", [rows, self._vector(nodes, use, "out_lambda", joined=back)], rows)
        nodes.replace(output, self._from_rows(nodes, use, scaled, back, output), readers)

    def _replace_head(self, site: Site, use: Use, head: Head) -> None:
        """The whole layer from the row: ``x W + c``, (…, k) → (…, labels)."""
        source, old = use.input, use.output
        readers = [(node, index) for node, index in old.uses()]
        nodes = self._nodes(site, use, source)
        rows, back = self._as_rows(nodes, use, source)
        weight, bias = self.values.tensor(nodes, head.weight_name), self.values.tensor(nodes, head.bias_name)
        if self.values.batched:
            bias = nodes.op("Unsqueeze", [bias, nodes.integers("axes", [1])], nodes.untold(bias))
        product = nodes.op("MatMul", [rows, weight], nodes.untold(rows))
        answer = nodes.op("Add", [product, bias], nodes.untold(rows))
        like = ir.Value(type=old.type, shape=ir.Shape([*(old.shape or [])[:-1], head.out_features]))
        if back:
            if len(source.shape or ()) != 2:
                raise PlanError(f"site '{site.path}' reads {source.shape}; heads of two or three axes can be packed")
            answer = nodes.op("Reshape", [answer, nodes.integers("head_shape", [-1, head.out_features])], like)
        else:
            answer.shape = like.shape
        nodes.replace(old, answer, readers)
        for value in downstream(answer) if head.out_features != site.out_features else ():
            if value.shape is not None and len(value.shape) and value.shape[-1] == site.out_features:
                value.shape = ir.Shape([*value.shape[:-1], head.out_features])

    def _vector(self, nodes: Nodes, use: Use, part: str, *, joined: bool) -> ir.Value:
        """The site's part of a vector, ready to broadcast over rows: (B, 1, k), or (B, k, 1) for a convolution.

        ``joined``: whether a convolution's positions are one axis.
        """
        value = self.values.vector(part, nodes.path)
        if not use.convolves:
            return value
        spatial = 1 if joined else len(use.weight.shape) - 2
        shape = [0, -1, 1] if self.values.batched else [-1, *[1] * spatial]
        return nodes.op("Reshape", [value, nodes.integers("per_channel", shape)], nodes.untold(value))

    def _as_rows(self, nodes: Nodes, use: Use, value: ir.Value) -> tuple[ir.Value, bool]:
        """``value`` with the batch alone on its first of three axes, and whether that took a reshape.

        A graph may have joined batch and sequence, (B S, k), or windows, (B w, n, k), always the batch first; a reshape
        undoes that at no cost.  With one row for all, the last axis is all that counts.
        """
        shape = value.shape
        if shape is None:
            raise PlanError(f"site '{nodes.path}': the shape of its input is not known; export the base graph again")
        if not self.values.batched and (not use.convolves or "A" not in self.layout.sites().get(nodes.path, set())):
            return value, False
        first = shape[0]
        rank = len(shape)
        alone = not self.values.batched or (isinstance(first, ir.SymbolicDim) and str(first.value) == self.batch)
        if rank == 3 and alone:
            return value, False
        if id(value) not in self._rows_of:
            features = shape[1] if use.convolves else shape[-1]
            if not isinstance(features, int):
                raise PlanError(f"site '{nodes.path}': its number of features is not fixed in the graph")
            target = self.values.row_shape(nodes, [features, -1] if use.convolves else [-1, features])
            self._rows_of[id(value)] = nodes.op("Reshape", [value, target], nodes.untold(value))
        return self._rows_of[id(value)], True

    def _from_rows(self, nodes: Nodes, use: Use, rows: ir.Value, back: bool, like: ir.Value) -> ir.Value:
        """``rows`` in the shape of ``like``."""
        if not back:
            rows.shape = like.shape if rows.shape is None else rows.shape
            return rows
        shape = like.shape or ir.Shape([])
        if len(shape) == 2 and isinstance(shape[1], int):
            target = nodes.integers("flat", [-1, shape[1]])
        else:
            known = [dim if isinstance(dim, int) else -1 for dim in shape]
            if known.count(-1) > 1:
                target = nodes.op("Shape", [like], ir.Value(type=ir.TensorType(ir.DataType.INT64)))
            else:
                target = nodes.integers("shape", known)
        return nodes.op("Reshape", [rows, target], like)

    def _nodes(self, site: Site, use: Use, source: ir.Value, *, after: ir.Node | None = None) -> Nodes:
        return Nodes(self.graph, self.names, site, use, source, after=after)
