"""Placement ``norm``: fold an edit into the scale and shift of the norm that feeds the site.

The site's input is ``γ ⊙ z + β``, so ``T(x) = (1+λ) ⊙ x + δ`` is ``γ' = (1+λ) γ``, ``β' = (1+λ) β + δ``: exact, free at
run time, and a patch of two vectors.  It is right only if *everything* that reads the norm carries the same T.
Sources: arXiv 2510.19155 for T; the ONNX pages of LayerNormalization, RMSNormalization, BatchNormalization,
InstanceNormalization and GroupNormalization for where their scale and shift stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Edit
from deployfa.graph.sites import Site
from deployfa.graph.tensors import cast_once, set_operand

__all__ = [
    "Norm",
    "find_norm",
    "fold_into_norm",
    "norm_output",
    "norm_readers",
    "same_transform",
    "why_not_norm",
]

#: Operators with a scale in input 1 and a shift in input 2, over the last axis (dense) or over channels (conv).
_OVER_FEATURES = {"LayerNormalization"}
_OVER_CHANNELS = {"BatchNormalization", "InstanceNormalization", "GroupNormalization"}
_WITHOUT_SHIFT = {"RMSNormalization", "SimplifiedLayerNormalization"}


@dataclass(frozen=True, eq=False)
class Norm:
    """Where a norm keeps γ and β.  ``offset`` is what the graph adds to the stored γ (Gemma stores γ - 1).

    ``shift_node`` is ``None`` for a norm that has no shift and cannot get one.
    """

    scale_node: ir.Node
    scale_index: int
    shift_node: ir.Node | None
    shift_index: int
    offset: float

    @property
    def scale(self) -> ir.Value:
        value = self.scale_node.inputs[self.scale_index]
        assert value is not None  # find_norm takes only constants
        return value

    @property
    def shift(self) -> ir.Value | None:
        node = self.shift_node
        return node.inputs[self.shift_index] if node is not None and self.shift_index < len(node.inputs) else None

    @property
    def bytes(self) -> int:
        """What a patch of this norm weighs: γ and, if there is one, β."""
        values = [self.scale, *([self.shift] if self.shift is not None else [])]
        return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def norm_output(site: Site) -> ir.Value:
    """The value that the norm would have to produce: the site's input, or what it is a view of.

    A dense site may read a (batch * sequence, k) view (GPT-2's Conv1D): a Reshape from (…, k) to (…, k) moves no
    feature.
    """
    value = site.uses[0].input
    while site.layout != "conv" and (node := value.producer()) is not None and _keeps_features(node, site.in_features):
        source = node.inputs[0]
        assert source is not None  # _keeps_features has looked
        value = source
    return value


def norm_readers(site: Site) -> list[tuple[ir.Node | None, int]]:
    """Every (node, input index) that reads ``norm_output(site)``, views looked through; (None, 0) for the graph's own
    outputs."""
    readers: list[tuple[ir.Node | None, int]] = []
    waiting = [norm_output(site)]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            readers.append((None, 0))
        for node, index in value.uses():
            if site.layout != "conv" and index == 0 and _keeps_features(node, site.in_features):
                waiting.append(node.outputs[0])
            else:
                readers.append((node, index))
    return readers


def find_norm(site: Site) -> Norm | None:
    """The norm whose output is the input of ``site``; ``None`` if there is none with a constant scale over k."""
    node = norm_output(site).producer()
    if node is None:
        return None
    k, conv = site.in_features, site.layout == "conv"
    if node.op_type in (_OVER_CHANNELS if conv else _OVER_FEATURES | _WITHOUT_SHIFT):
        return _operator(node, k, conv=conv)
    if node.op_type == "Add":
        return _multiply_add(node, k, site)
    return _multiply(node, k, site, None, 0) if node.op_type == "Mul" else None


def why_not_norm(site: Site, sites: Mapping[ir.Node, Site], edits: Mapping[str, Edit]) -> str | None:
    """The fact that blocks the fold of ``site``'s edit into its norm; ``None`` if it is exact.

    ``sites``: node → site, for every use in the graph; ``edits``: the edits that would fold into norms, by site.
    """
    edit = edits[site.path]
    if edit.input_low_rank is not None or edit.output_low_rank is not None:
        return "low rank mixes features, a norm has one scale each"
    if len(site.uses) > 1:
        return "module is called more than once"
    norm = find_norm(site)
    if norm is None:
        return "input does not come from a norm with a constant scale"
    if edit.delta is not None and norm.shift_node is None:
        return "norm has no shift for δ"
    for node, index in norm_readers(site):
        other = sites.get(node) if node is not None else None
        if node is None:
            return "norm is also an output of the graph"
        if other is None or index != 0:
            return f"norm also feeds {node.op_type} '{node.name}'"
        if other.path not in edits or not same_transform(edit, edits[other.path]):
            return f"norm also feeds '{other.path}', whose edit is another"
    return None


def same_transform(first: Edit, second: Edit) -> bool:
    """Whether two edits are one T(x), to the bit."""
    pairs = ((first.lam, second.lam), (first.delta, second.delta))
    return not any(e.input_low_rank or e.output_low_rank for e in (first, second)) and all(
        (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs
    )


def fold_into_norm(graph: ir.Graph, site: Site, edit: Edit) -> None:
    """``γ' = (1+λ) γ``, ``β' = (1+λ) β + δ``, in float64, rounded once; call it once for all sites of the norm."""
    norm = find_norm(site)
    assert norm is not None  # the plan places here only sites with a norm
    k = site.in_features
    scale = 1.0 + edit.lam.astype(np.float64) if edit.lam is not None else np.ones(k)
    stored = norm.scale
    gamma = _vector(stored) + norm.offset
    _write(graph, norm.scale_node, norm.scale_index, gamma * scale - norm.offset, stored, f"{site.path}/norm_scale")
    if norm.shift_node is None:
        return
    shift = norm.shift
    if shift is None and edit.delta is None:
        return
    beta = _vector(shift) if shift is not None else np.zeros(k)
    delta = edit.delta.astype(np.float64) if edit.delta is not None else 0.0
    like = shift if shift is not None else stored
    _write(graph, norm.shift_node, norm.shift_index, beta * scale + delta, like, f"{site.path}/norm_shift")


def _write(graph: ir.Graph, node: ir.Node, index: int, vector: Array, like: ir.Value, name: str) -> None:
    """Store ``vector`` (k,) in the shape and dtype of ``like``."""
    shape = tuple(int(dim) for dim in like.shape or ())  # type: ignore[arg-type]
    set_operand(graph, [node], index, cast_once(vector, like.dtype, name).reshape(shape), name=name)


def _keeps_features(node: ir.Node, k: int) -> bool:
    """Whether ``node`` is a view that leaves the last axis, of length k, as it is."""
    if node.op_type not in {"Reshape", "Identity"} or node.inputs[0] is None:
        return False
    shapes = node.inputs[0].shape, node.outputs[0].shape
    return all(shape is not None and len(shape) > 0 and shape[-1] == k for shape in shapes)


def _operator(node: ir.Node, k: int, *, conv: bool) -> Norm | None:
    """A norm that is one node."""
    if not conv and node.attributes.get_int("axis", -1) != -1:
        return None
    if node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", 0) != 0:
        return None
    # a node with further outputs (mean, running statistics) computes them from the input: they do not change
    if not _is_vector(node.inputs[1], k, 0):
        return None
    has_shift = node.op_type not in _WITHOUT_SHIFT
    shift = node.inputs[2] if has_shift and len(node.inputs) > 2 else None
    if shift is not None and not _is_vector(shift, k, 0):
        return None
    return Norm(node, 1, node if has_shift else None, 2, 0.0)


def _multiply_add(node: ir.Node, k: int, site: Site) -> Norm | None:
    """``z ⊙ γ + β`` as exporters decompose it."""
    for index, operand in enumerate(node.inputs):
        product = node.inputs[1 - index]
        if _is_vector(operand, k, len(site.kernel)) and product is not None and len(product.uses()) == 1:
            producer = product.producer()
            if producer is not None and producer.op_type == "Mul" and not product.is_graph_output():
                return _multiply(producer, k, site, node, index)
    return None


def _multiply(node: ir.Node, k: int, site: Site, shift_node: ir.Node | None, shift_index: int) -> Norm | None:
    """``z ⊙ γ``, with γ a constant or Gemma's ``1 + w``."""
    for index, operand in enumerate(node.inputs):
        if _is_vector(operand, k, len(site.kernel)):
            return Norm(node, index, shift_node, shift_index, 0.0)
        adder = operand.producer() if operand is not None else None
        if adder is None or adder.op_type != "Add" or operand is None or len(operand.uses()) != 1:
            continue
        for at, stored in enumerate(adder.inputs):
            one = adder.inputs[1 - at]
            if _is_vector(stored, k, len(site.kernel)) and _is_number(one):
                assert one is not None and one.const_value is not None  # _is_number has looked
                return Norm(adder, at, shift_node, shift_index, float(one.const_value.numpy().reshape(())))
    return None


def _is_vector(value: ir.Value | None, k: int, spatial: int) -> bool:
    """A floating-point constant of k numbers that broadcasts over the features: (…1, k), or (…1, k, 1, …)."""
    if value is None or value.const_value is None or value.is_graph_input() or value.shape is None:
        return False
    if not value.is_initializer() or value.dtype is None or not value.dtype.is_floating_point():
        return False
    shape = tuple(value.shape)
    return value.const_value.size == k and len(shape) > spatial and shape[len(shape) - 1 - spatial] == k


def _is_number(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.size == 1


def _vector(value: ir.Value) -> Array:
    assert value.const_value is not None  # find_norm takes only constants
    return np.asarray(value.const_value.numpy()).astype(np.float64).reshape(-1)
