"""Placement ``side op``: compute T(x) beside the layer, which stays as it is.

``Mul`` for ``1 + λ``; ``MatMul · MatMul · Add`` for low rank (1x1 ``Conv`` for a convolution); ``Add`` for δ.
Sites that read the same tensor with equal edits share one set of nodes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Edit, LowRank
from deployfa.graph.sites import Site, Use
from deployfa.graph.tensors import add_initializer, cast_once

__all__ = ["SideOps"]


@dataclass
class SideOps:
    """Builds side ops on one graph and remembers them, so that equal ones are built once."""

    graph: ir.Graph
    _built: dict[tuple[int, str], ir.Value] = field(default_factory=dict)

    def place(self, site: Site, edit: Edit) -> None:
        """Insert the side op of ``edit`` before (LoRA: around) every use of ``site``."""
        for use in site.uses:
            source = use.input
            changed = self._transformed(site, use, source, edit)
            if edit.output_low_rank is not None:
                self._add_to_output(site, use, source, edit.output_low_rank)
            if changed is not source:
                use.node.replace_input_with(0, changed)

    def _transformed(self, site: Site, use: Use, source: ir.Value, edit: Edit) -> ir.Value:
        """``T(x)``; x itself for an edit of the output only."""
        key = (id(source), _digest(edit, conv=use.layout == "conv"))
        if key in self._built:
            return self._built[key]
        builder = _Nodes(self.graph, site, use, source)
        result = source
        if edit.lam is not None:
            scale = 1.0 + edit.lam.astype(np.float64)
            result = builder.op("Mul", [result, builder.constant("scale", builder.per_channel(scale))], source)
        if edit.input_low_rank is not None:
            low = builder.low_rank(source, edit.input_low_rank)
            result = builder.op("Add", [result, low], source)
        if edit.delta is not None:
            shift = builder.constant("shift", builder.per_channel(edit.delta.astype(np.float64)))
            result = builder.op("Add", [result, shift], source)
        self._built[key] = result
        return result

    def _add_to_output(self, site: Site, use: Use, source: ir.Value, low: LowRank) -> None:
        """``y + s' B' (A' x)``, between the layer and its bias so that a bias fusion after it still matches."""
        output = use.node.outputs[0]
        builder = _Nodes(self.graph, site, use, source, after=use.node)
        branch = builder.low_rank(source, low, output=True)
        name, was_output = output.name, output.is_graph_output()
        consumers = [(node, index) for node, index in output.uses()]
        total = builder.op("Add", [output, branch], output)
        for node, index in consumers:
            node.replace_input_with(index, total)
        if was_output:
            index = list(self.graph.outputs).index(output)
            self.graph.outputs[index] = total
            output.name, total.name = f"{name}_unadapted", name


class _Nodes:
    """Appends nodes after an anchor, in order, each with a readable name and the shape of its like."""

    def __init__(
        self, graph: ir.Graph, site: Site, use: Use, source: ir.Value, *, after: ir.Node | None = None
    ) -> None:
        self._graph, self._site, self._use = graph, site, use
        self._anchor = after if after is not None else source.producer()
        self._after, self._count = after is not None, 0

    def per_channel(self, vector: Array) -> Array:
        """(k,) → the shape that broadcasts over the op's input: (k,), or (k, 1, …) for a convolution."""
        spatial = len(self._site.shape) - 2 if self._use.layout == "conv" else 0
        return vector.reshape(vector.shape[0], *([1] * spatial))

    def constant(self, name: str, array: Array) -> ir.Value:
        dtype = self._use.input.dtype or self._site.weight.dtype
        stored = cast_once(array, dtype, self._site.path, remedy="use a float32 base graph")
        return add_initializer(self._graph, f"{self._site.path}/{name}", stored)

    def op(self, op_type: str, inputs: list[ir.Value], like: ir.Value, **attributes: object) -> ir.Value:
        """A node whose output has the dtype and shape of ``like``."""
        node = ir.node(op_type, inputs, attributes=attributes)  # type: ignore[arg-type]
        node.name = f"{self._site.path}/{'output' if self._after else 'input'}_{op_type.lower()}_{self._count}"
        self._count += 1
        node.metadata_props["deployfa.site"] = self._site.path
        node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        if self._anchor is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(self._anchor, node)
        self._anchor = node
        return node.outputs[0]

    def low_rank(self, source: ir.Value, low: LowRank, *, output: bool = False) -> ir.Value:
        """``s B (A x)``.  s goes into B: (out, r) is the smaller of the two for an input of many features."""
        name = "lora" if output else "lorfa"
        a, b = low.a.astype(np.float64), low.s * low.b.astype(np.float64)
        like = self._use.node.outputs[0] if output else source
        if self._use.layout == "conv":
            spatial = len(self._site.shape) - 2
            # LoRA's A strides and pads as the layer does, and reads all its groups
            own = {name: value for name, value in self._use.node.attributes.items() if name != "group"}
            attributes = own if output else {}
            kernel = a if a.ndim > 2 else a.reshape(*a.shape, *([1] * spatial))
            down = self._like_rank(source)
            inner = self.op("Conv", [source, self.constant(f"{name}_A", kernel)], down, **attributes)
            return self.op("Conv", [inner, self.constant(f"{name}_B", b.reshape(*b.shape, *([1] * spatial)))], like)
        inner = self.op("MatMul", [source, self.constant(f"{name}_A", a.T)], self._like_rank(source))
        return self.op("MatMul", [inner, self.constant(f"{name}_B", b.T)], like)

    @staticmethod
    def _like_rank(source: ir.Value) -> ir.Value:
        """A value with the dtype of ``source`` and no shape: the runtime infers the (…, r) in between."""
        return ir.Value(type=source.type)


def _digest(edit: Edit, *, conv: bool) -> str:
    digest = hashlib.sha256(b"conv" if conv else b"dense")
    for name, array in sorted(edit.tensors().items()):
        if not name.startswith("out_"):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
