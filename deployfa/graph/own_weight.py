"""Placement ``own weight``: fold an edit into the layer's own weight and bias, or into its scales if quantised."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Edit, Float64, fold_conv, fold_matrix
from deployfa.graph.large import fold_rows, is_large, passed_shift
from deployfa.graph.layers import Axis, Use, read_layer
from deployfa.graph.sites import Site
from deployfa.graph.tensors import add_initializer, cast_once, set_operand
from deployfa.graph.views import Resize
from deployfa.graph.weights import Weight, in_layout

__all__ = [
    "alone",
    "fold_into_own_weight",
    "scale_weight",
    "set_bias",
    "why_not_own_weight",
    "why_not_scaled",
    "write_weight",
]


def why_not_own_weight(site: Site, edit: Edit, *, untie: bool = False) -> str | None:
    """The fact that blocks the fold, by name; ``None`` if the fold is exact.

    ``untie``: whether a weight that an embedding reads too may get a copy of its own.
    """
    weight = site.weight
    if any(use.integer for use in site.uses):
        return "product is computed in integers, with one scale for all inputs"
    if weight.is_input:
        return "weight is a graph input"
    if not weight.is_constant:
        return "weight is computed in the graph"
    if weight.embeds and not untie:
        return "weight is tied to the embedding"
    low_rank = edit.input_low_rank is not None or edit.output_low_rank is not None
    if weight.quantised:
        if low_rank:
            return "weight is quantised, low rank would requantise it"
        if edit.lam is not None:
            scale = 1.0 + edit.lam.astype(np.float64)
            if any(use.dynamic is not None for use in site.uses):
                return "weight is quantised with one scale for all inputs"
            blocked = why_not_scaled(site, "in", scale)
            if blocked is not None:
                return blocked
        if edit.output_scale is not None:
            blocked = why_not_scaled(site, "out", 1.0 + edit.output_scale.astype(np.float64))
            if blocked is not None:
                return blocked
            if edit.lam is not None and weight.scales is not None and weight.scales.single:
                return "weight is quantised with one scale, which takes no factors of inputs and outputs both"
    if site.groups != 1 and low_rank:
        return "low rank before a grouped convolution"
    if site.layout == "conv transpose" and edit.output_low_rank is not None and set(site.kernel) != {1}:
        return "low rank beside a transposed convolution"
    if edit.delta is not None and any(use.zero_padding for use in site.uses):
        return "δ before a zero-padded convolution"
    if edit.delta is not None and site.layout == "conv transpose":
        return "δ before a transposed convolution"
    return None if edit.delta is None and edit.output_scale is None else _why_not_rebiased(site)


def why_not_scaled(site: Site, which: Axis, factor: Array) -> str | None:
    """What keeps ``factor`` along the inputs or outputs of ``site`` from going into its stored weight."""
    for use in site.uses:
        blocked = why_not_use_scaled(use, which, factor, {other.node for other in site.uses})
        if blocked is not None:
            return blocked
    return None


def why_not_use_scaled(use: Use, which: Axis, factor: Array, ours: set[ir.Node]) -> str | None:
    """The same for one use; ``ours``: the nodes that may read the weight."""
    weight = use.weight
    if weight.is_input:
        return "weight is a graph input"
    if not weight.is_constant:
        return "weight is computed in the graph"
    if weight.scales is None:
        return None
    if use.groups != 1 and (which == "in") == (use.layout == "conv"):
        return "weight of a grouped convolution is quantised"
    axis = _integer_axis(weight, use.axis(which))
    if axis is None:
        return "weight is quantised and reshaped"
    if weight.scales.form not in {"product", "blocks"} and not alone(weight, ours):
        return "weight is quantised and shared with another layer"
    return weight.scales.why_not(axis, factor)


def fold_into_own_weight(graph: ir.Graph, site: Site, edit: Edit) -> None:
    """``W' = diag(1+λ') (W (diag(1+λ) + s B A) + s' B' A')``, ``c' = (1+λ') ⊙ (c + W δ)``; see ``deployfa.edits``.

    A Gemm computes ``α W x + β c``: the edit is folded into ``α W`` and divided by α, so that LoRA's delta, which adds
    to the output, comes out right.  Of a quantised weight only the scales change.
    """
    first = site.uses[0]
    if is_large(site.weight):
        _fold_large(graph, site, edit)
        return
    passed = None
    if edit.delta is not None or not site.weight.quantised:
        weight = site.constant_weight()
        assert weight is not None  # the plan places here only constant weights
        folded, passed = _fold(site, edit, weight.astype(np.float64) * first.alpha)
        if edit.changes_weight and not site.weight.quantised:
            write_weight(graph, site, in_layout(folded / first.alpha, site.layout, site.groups))
    if site.weight.quantised and edit.lam is not None:
        scale_weight(graph, site, "in", 1.0 + edit.lam.astype(np.float64))
    if site.weight.quantised and edit.output_scale is not None:
        # the scales as they are by now, which may be a copy
        now = Site(site.path, tuple(read_layer(use.node) or use for use in site.uses))
        scale_weight(graph, now, "out", 1.0 + edit.output_scale.astype(np.float64))
    _rebias(graph, site, edit, passed)


def _fold_large(graph: ir.Graph, site: Site, edit: Edit) -> None:
    """The same, in blocks, when the graph is saved."""
    by_inputs, alpha = site.layout == "kd", site.uses[0].alpha
    passed = None
    if edit.delta is not None:
        scale = 1.0 if edit.output_scale is None else 1.0 + edit.output_scale.astype(np.float64)
        passed = scale * alpha * passed_shift(site.weight, edit.delta, rows_are_inputs=by_inputs)
    if edit.changes_weight:
        folded = fold_rows(site.weight, edit, site.path, rows_are_inputs=by_inputs, alpha=alpha)
        set_operand(graph, site.nodes, 1, folded, name=f"{site.path}.weight")
    _rebias(graph, site, edit, passed)


def _rebias(graph: ir.Graph, site: Site, edit: Edit, passed: Float64 | None) -> None:
    """``c' = (1+λ') ⊙ c + passed``, with ``passed = (1+λ') ⊙ W δ``; a layer without a bias gets one only for δ."""
    shape = (site.out_features,) if passed is None else passed.shape
    scale = 1.0 if edit.output_scale is None else 1.0 + edit.output_scale.astype(np.float64)
    for use in site.uses:
        if passed is not None:
            set_bias(graph, site, use, scale * _bias(use, shape) + passed)
        elif edit.output_scale is not None and use.bias_value is not None:
            set_bias(graph, site, use, scale * _bias(use, shape))


def write_weight(graph: ir.Graph, site: Site, operand: Array) -> None:
    """Make ``operand``, as the layer reads it, the weight of every use; what other layers read stays as it was."""
    weight = site.weight
    array = cast_once(np.asarray(operand, dtype=np.float64), weight.dtype, site.path)
    if weight.nodes and alone(weight, set(site.nodes)) and len({id(use.weight.operand) for use in site.uses}) == 1:
        set_operand(graph, [weight.nodes[0]], 0, weight.as_stored(array), name=f"{site.path}.weight")
    else:
        if weight.operand.dtype is not None:
            # a Cast is left out: the layer reads what it made
            array = cast_once(np.asarray(operand, dtype=np.float64), weight.operand.dtype, site.path)
        set_operand(graph, site.nodes, 1, array, name=f"{site.path}.weight")


def scale_weight(graph: ir.Graph, site: Site, which: Axis, factor: Array) -> None:
    """``W diag(f)`` (``in``) or ``diag(f) W`` (``out``) in the scales of a quantised weight."""
    done: set[ir.Node] = set()
    for use in site.uses:
        scales = use.weight.scales
        assert scales is not None  # why_not_scaled has looked
        if scales.node in done:
            continue
        done.add(scales.node)
        axis = _integer_axis(use.weight, use.axis(which))
        assert axis is not None  # why_not_scaled has looked
        stored = cast_once(scales.scaled(axis, factor), scales.dtype, site.path)
        set_operand(graph, [scales.node], scales.index, stored, name=f"{site.path}.weight_scale")
        if scales.form == "product":
            # one scale may have become one for each output
            scales.node.outputs[0].shape = ir.Shape(stored.shape)


def set_bias(graph: ir.Graph, site: Site, use: Use, bias: Array) -> None:
    """Make ``bias`` (d,), or (experts, 1, d), float64 the bias of ``use``; a MatMul that has none gets an ``Add``."""
    name = f"{site.path}.bias"
    dtype = use.product.dtype if site.weight.quantised or use.weight.nodes else site.weight.dtype
    if use.bias_node is not None:
        stored = bias / (use.beta or 1.0)
        if use.beta == 0.0:
            use.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        set_operand(graph, [use.bias_node], use.bias_index, cast_once(stored, dtype, site.path), name=name)
        return
    operand = add_initializer(graph, name, cast_once(bias, dtype, site.path))
    output = use.product
    add = ir.node("Add", [output, operand], name=f"{site.path}/bias")
    add.metadata_props.update(use.node.metadata_props)
    added = add.outputs[0]
    added.shape, added.type = output.shape, output.type
    maker = output.producer()
    assert maker is not None  # a layer's product is made by one of its nodes
    graph.insert_after(maker, add)
    output.replace_all_uses_with(added, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    if added.is_graph_output():
        added.name, output.name = output.name, f"{output.name}_without_bias"


def _fold(site: Site, edit: Edit, weight: Float64) -> tuple[Float64, Float64 | None]:
    """(W', W δ) of a dense layer, of each expert of many, or of a convolution."""
    if site.convolves:
        return fold_conv(edit, weight, None, groups=site.groups)
    if not site.experts:
        return fold_matrix(edit, weight, None)
    matrices = weight.reshape(-1, *weight.shape[-2:])
    folded = [fold_matrix(edit, matrix, None) for matrix in matrices]
    together = np.stack([matrix for matrix, _ in folded]).reshape(weight.shape)
    if edit.delta is None:
        return together, None
    passed = np.stack([shift for _, shift in folded if shift is not None])
    return together, passed.reshape(*site.experts, 1, site.out_features)


def _why_not_rebiased(site: Site) -> str | None:
    """What keeps W δ, or the scale of an output, out of the bias."""
    for use in site.uses:
        if use.bias_value is None:
            continue
        bias = use.bias
        if use.bias_value.is_graph_input() or (bias is not None and bias.is_input):
            return "bias is a graph input"
        if bias is None or not bias.is_constant:
            return "bias is computed in the graph"
        if bias.quantised:
            return "bias is quantised"
        if set(bias.shape[:-1]) - {1} or bias.shape[-1:] not in {(), (1,), (site.out_features,)}:
            return "bias differs by position"
    return None


def alone(weight: Weight, ours: set[ir.Node]) -> bool:
    """Whether nothing but ``ours`` reads the operand, or anything on the way to it."""
    outer = weight.scales.node.outputs[0] if weight.scales is not None else None
    chain = [node.outputs[0] for node in weight.nodes] or ([outer] if outer is not None else [])
    if outer is not None and weight.nodes and len(list(outer.uses())) > 1:
        return False
    if any(value.is_graph_output() for value in chain):
        return False
    return all(len(list(value.uses())) == 1 for value in chain[:-1]) and (
        not chain or set(chain[-1].consumers()) <= ours
    )


def _integer_axis(weight: Weight, axis: int) -> int | None:
    """The axis of the integers that becomes ``axis`` of the operand."""
    for view in reversed(weight.views):
        perm = getattr(view, "perm", None)
        if perm is not None:
            axis = perm[axis]
        elif isinstance(view, Resize) and view.before != view.after:
            return None
    return axis


def _bias(use: Use, shape: tuple[int, ...]) -> Float64:
    """The bias that ``use`` adds now, in ``shape``, float64; zeros if none."""
    bias = use.bias
    if bias is None or not bias.is_constant:
        return np.zeros(shape)
    stored = bias.numbers().astype(np.float64)
    flat = stored.reshape(-1) if len(shape) == 1 else stored
    return np.asarray(np.broadcast_to(flat, shape) * use.beta)
