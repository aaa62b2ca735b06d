"""Placement ``own weight``: fold an edit into the layer's own weight and bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array, Edit, fold_conv, fold_matrix
from deployfa.graph.sites import Site, Use
from deployfa.graph.tensors import add_initializer, cast_once, set_operand

__all__ = ["fold_into_own_weight", "set_bias"]


def fold_into_own_weight(graph: ir.Graph, site: Site, edit: Edit) -> None:
    """``W' = W (diag(1+λ) + s B A) + s' B' A'``, ``c' = c + W δ``; see ``deployfa.edits``.

    A Gemm computes ``α W x + β c``: the edit is folded into ``α W`` and divided by α, so that LoRA's delta, which adds
    to the output, comes out right.
    """
    weight = site.constant_weight()
    assert weight is not None  # the plan places here only constant weights
    first = site.uses[0]
    effective = weight.astype(np.float64) * first.alpha
    if site.layout == "conv":
        folded, passed = fold_conv(edit, effective, None, groups=site.groups)
    else:
        folded, passed = fold_matrix(edit, effective, None)
    folded = folded / first.alpha
    stored = folded.T if site.layout == "kd" else folded
    set_operand(
        graph,
        [use.node for use in site.uses],
        1,
        cast_once(stored, site.weight.dtype, site.path),
        name=f"{site.path}.weight",
    )
    if passed is not None:
        for use in site.uses:
            set_bias(graph, site, use, _bias(use, site.out_features) + passed)


def set_bias(graph: ir.Graph, site: Site, use: Use, bias: Array) -> None:
    """Make ``bias`` (d,) float64 the bias of ``use``, adding an ``Add`` after a MatMul that has none."""
    name = f"{site.path}.bias"
    if use.bias_node is not None:
        stored = bias / (use.beta or 1.0)
        if use.beta == 0.0:
            use.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        set_operand(graph, [use.bias_node], use.bias_index, cast_once(stored, site.weight.dtype, site.path), name=name)
        return
    operand = add_initializer(graph, name, cast_once(bias, site.weight.dtype, site.path))
    output = use.node.outputs[0]
    add = ir.node("Add", [output, operand], name=f"{site.path}/bias")
    add.metadata_props.update(use.node.metadata_props)
    added = add.outputs[0]
    added.shape, added.type = output.shape, output.type
    graph.insert_after(use.node, add)
    output.replace_all_uses_with(added, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    if added.is_graph_output():
        added.name, output.name = output.name, f"{output.name}_without_bias"


def _bias(use: Use, out_features: int) -> Array:
    """The bias that ``use`` adds now, (d,) float64; zeros if none."""
    if use.bias is None or use.bias.const_value is None:
        return np.zeros(out_features)
    stored: Array = np.asarray(use.bias.const_value.numpy()).astype(np.float64).reshape(-1)
    return np.broadcast_to(stored, (out_features,)) * use.beta
