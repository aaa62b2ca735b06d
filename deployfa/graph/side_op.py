"""Placement ``side op``: compute T(x) beside the layer, whose weight stays as it is.

``Mul`` for ``1 + λ``; ``MatMul · MatMul · Add`` for low rank (1x1 ``Conv`` for a convolution); ``Add`` for δ.  A low
rank on the input has two exact forms, ``W (x + s B A x)`` and ``W x + (s W B) (A x)``; the plan says which is cheaper.
Sites that read the same tensor share one set of nodes where their edits are equal, and one product with all their A's
where they are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Edit, Float64, LowRank
from deployfa.graph.floats import spell_out
from deployfa.graph.layers import Use
from deployfa.graph.nodes import Nodes
from deployfa.graph.sites import Site

__all__ = ["Form", "SideOps", "digest"]

#: Where a LoRFA's product is added: to the layer's input, or to its output.
Form = Literal["input", "output"]


@dataclass
class SideOps:
    """Builds side ops on one graph and remembers them, so that equal ones are built once."""

    graph: ir.Graph
    names: set[str] = field(default_factory=set)
    _inputs: dict[tuple[int, str], ir.Value] = field(default_factory=dict)
    _quantized: dict[int, ir.Node] = field(default_factory=dict)
    _downs: dict[int, _Downs] = field(default_factory=dict)

    def place(self, edits: Sequence[tuple[Site, Edit, Form]]) -> None:
        """Insert the side op of every edit before, or around, every use of its site."""
        ready = [(_spelled_out(self.graph, site), edit, form) for site, edit, form in edits]
        for site, edit, form in ready:
            for use in site.uses:
                if not use.convolves:
                    before, added = _parts(site, edit, form)
                    for low in (before.input_low_rank, added):
                        if low is not None:
                            self._products_of(use.input).register(low)
        for site, edit, form in ready:
            for use in site.uses:
                self._place(site, use, use.input, edit, form)
        self.graph.sort()

    def _place(self, site: Site, use: Use, source: ir.Value, edit: Edit, form: Form) -> None:
        before, added = _parts(site, edit, form)
        changed = self._transformed(site, use, source, before)
        output = use.product if added is None else self._add_to_output(site, use, source, added)
        if edit.output_scale is not None:
            if use.bias_node is not None and use.bias_node is not use.node:
                output = use.bias_node.outputs[0]
            self._scale_output(site, use, output, edit.output_scale)
        if changed is not source:
            self._feed(site, use, changed)

    def _transformed(self, site: Site, use: Use, source: ir.Value, edit: Edit) -> ir.Value:
        """``T(x)``; x itself for an edit of the output only."""
        key = (id(source), digest(edit, conv=use.convolves))
        if key in self._inputs:
            return self._inputs[key]
        nodes = Nodes(self.graph, self.names, site, use, source)
        result = source
        if edit.lam is not None:
            scale = 1.0 + edit.lam.astype(np.float64)
            result = nodes.op("Mul", [result, nodes.constant("scale", nodes.per_channel(scale))], source)
        if edit.input_low_rank is not None:
            low = self._low_rank(nodes, use, source, edit.input_low_rank, "lorfa", source)
            result = nodes.op("Add", [result, low], source)
        if edit.delta is not None:
            shift = nodes.constant("shift", nodes.per_channel(edit.delta.astype(np.float64)))
            result = nodes.op("Add", [result, shift], source)
        self._inputs[key] = result
        return result

    def _scale_output(self, site: Site, use: Use, output: ir.Value, scale: Array) -> None:
        """``(1+λ') ⊙ y``, after everything else that makes y."""
        nodes = Nodes(self.graph, self.names, site, use, output, after=output.producer())
        consumers = [(node, index) for node, index in output.uses()]
        factor = nodes.constant("output_scale", nodes.per_channel(1.0 + scale.astype(np.float64)))
        nodes.replace(output, nodes.op("Mul", [output, factor], output), consumers)

    def _add_to_output(self, site: Site, use: Use, source: ir.Value, low: LowRank) -> ir.Value:
        """``y + s' B' (A' x)``, between the layer and its bias so that a bias fusion after it still matches."""
        product = use.product
        nodes = Nodes(self.graph, self.names, site, use, source, after=product.producer())
        branch = self._low_rank(nodes, use, source, low, "lora", product)
        consumers = [(node, index) for node, index in product.uses()]
        total = nodes.op("Add", [product, branch], product)
        nodes.replace(product, total, consumers)
        return total

    def _low_rank(self, nodes: Nodes, use: Use, source: ir.Value, low: LowRank, name: str, like: ir.Value) -> ir.Value:
        """``s B (A x)``.  s goes into B: (out, r) is the smaller of the two for an input of many features."""
        b = low.s * low.b.astype(np.float64)
        if use.convolves:
            spatial = len(use.weight.shape) - 2
            # LoRA's A strides and pads as the layer does, and reads all its groups
            own = {name: value for name, value in use.node.attributes.items() if name != "group"}
            a = low.a.astype(np.float64)
            kernel = a if a.ndim > 2 else a.reshape(*a.shape, *([1] * spatial))
            attributes = own if name == "lora" else {}
            inner = nodes.op("Conv", [source, nodes.constant(f"{name}_A", kernel)], nodes.untold(source), **attributes)
            up = nodes.constant(f"{name}_B", b.reshape(*b.shape, *([1] * spatial)))
            return nodes.op("Conv", [inner, up], like)
        inner = self._products_of(source).value(nodes, low, name)
        return nodes.op("MatMul", [inner, nodes.constant(f"{name}_B", b.T)], like)

    def _products_of(self, source: ir.Value) -> _Downs:
        return self._downs.setdefault(id(source), _Downs(source))

    def _feed(self, site: Site, use: Use, changed: ir.Value) -> None:
        """Make ``changed`` what ``use`` reads; a layer that quantises its input at run time quantises it anew."""
        if use.dynamic is None:
            use.node.replace_input_with(0, changed)
            return
        quantizer = self._quantized.get(id(changed))
        if quantizer is None:
            nodes = Nodes(self.graph, self.names, site, use, changed)
            quantizer = nodes.quantize_again(changed, use.dynamic.quantizer)
            self._quantized[id(changed)] = quantizer
        for node, index, output in use.dynamic.reads:
            node.replace_input_with(index, quantizer.outputs[output])


class _Downs:
    """The products ``A x`` of one x: one MatMul with all the A's, one under the other."""

    def __init__(self, source: ir.Value) -> None:
        self._source = source
        self._parts: dict[bytes, Array] = {}
        self._values: dict[bytes, ir.Value] = {}

    def register(self, low: LowRank) -> None:
        self._parts.setdefault(_key(low.a), low.a)

    def value(self, nodes: Nodes, low: LowRank, name: str) -> ir.Value:
        """``A x`` of ``low``, (…, r)."""
        self.register(low)
        missing = {key: part for key, part in self._parts.items() if key not in self._values}
        if _key(low.a) in missing:
            arrays = [part.astype(np.float64) for part in missing.values()]
            stacked = nodes.constant(f"{name}_A", np.concatenate(arrays).T)
            product = nodes.op("MatMul", [self._source, stacked], nodes.untold(self._source))
            parts = nodes.split(product, [len(array) for array in arrays]) if len(arrays) > 1 else [product]
            self._values |= dict(zip(missing, parts, strict=True))
        return self._values[_key(low.a)]


def digest(edit: Edit, *, conv: bool) -> str:
    """What two edits of the input must have in common to be one side op."""
    sha = hashlib.sha256(b"conv" if conv else b"dense")
    for name, array in sorted(edit.tensors().items()):
        if not name.startswith("out_"):
            sha.update(f"{name}{array.dtype}{array.shape}".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def _key(array: Array) -> bytes:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).digest()


def _parts(site: Site, edit: Edit, form: Form) -> tuple[Edit, LowRank | None]:
    """What changes the input, and the low rank that is added to the output."""
    added = [edit.output_low_rank] if edit.output_low_rank is not None else []
    low = edit.input_low_rank
    if low is not None and form == "output":
        added.append(_on_output(site, low))
        low = None
    total = _together(added) if len(added) > 1 else added[0] if added else None
    return Edit(edit.lam, low, edit.delta), total


def _on_output(site: Site, low: LowRank) -> LowRank:
    """``W (s B A x) = s (W B) (A x)``: the same low rank on the output; B': (d, r)."""
    weight = site.constant_weight()
    assert weight is not None and weight.ndim == 2  # the plan chooses this form only for such a weight
    alpha = site.uses[0].alpha
    moved: Float64 = alpha * (weight.astype(np.float64) @ low.b.astype(np.float64))
    return LowRank(low.a, moved, low.s)


def _together(parts: Sequence[LowRank]) -> LowRank:
    """``Σ s_i B_i A_i`` as one low rank: the A's one under the other, the B's side by side."""
    a = np.concatenate([part.a.astype(np.float64) for part in parts])
    return LowRank(a, np.concatenate([part.s * part.b.astype(np.float64) for part in parts], axis=1), 1.0)


def _spelled_out(graph: ir.Graph, site: Site) -> Site:
    """``site``, with integer layers spelled out as dequantize, layer, quantize."""
    return Site(site.path, tuple(spell_out(graph, use) if use.integer else use for use in site.uses))
