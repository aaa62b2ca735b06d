"""Give a head another number of outputs, so that adapters with other labels fit one base graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.graph.own_weight import set_bias
from deployfa.graph.sites import Site, find_sites
from deployfa.graph.tensors import set_operand

__all__ = ["answers", "downstream", "resize_heads"]

_PICKS = {"Cast", "Gather", "GatherND", "Identity", "Slice", "Squeeze", "Unsqueeze"}


def answers(site: Site) -> bool:
    """Whether what the layer makes is only picked from on its way to the graph's output, whatever its size."""
    seen = False
    for value in downstream(site.uses[0].output):
        seen = seen or value.is_graph_output()
        if any(index != 0 or node.op_type not in _PICKS for node, index in value.uses()):
            return False
    return seen


def resize_heads(model: ir.Model, adapter: Adapter) -> ir.Model:
    """``model``, or a clone of it whose heads have as many outputs as ``adapter`` brings, zeros for now."""
    wanted = {
        f"{module}.{name}".removesuffix(".weight"): int(array.shape[0])
        for module, parameters in adapter.modules.items()
        for name, array in parameters.items()
        if f"{module}.{name}".endswith(".weight") and array.ndim == 2
    }
    sites = find_sites(model)
    changed = {
        path: labels
        for path, labels in wanted.items()
        if path in sites and sites[path].out_features != labels and answers(sites[path])
    }
    if not changed:
        return model
    result = model.clone()
    sites = find_sites(result)
    for path, labels in changed.items():
        _resize(result.graph, sites[path], labels)
    return result


def _resize(graph: ir.Graph, site: Site, labels: int) -> None:
    use = site.uses[0]
    shape = list(use.weight.shape)
    shape[use.axis("out")] = labels
    name = use.weight.name
    set_operand(graph, site.nodes, 1, np.zeros(shape, np.float32), name=name)
    if use.bias_value is not None:
        set_bias(graph, site, use, np.zeros(labels))
    for value in (use.product, *downstream(use.output)):
        if value.shape is not None and len(value.shape) and value.shape[-1] == site.out_features:
            value.shape = ir.Shape([*value.shape[:-1], labels])


def downstream(start: ir.Value) -> Iterator[ir.Value]:
    """``start`` and everything that is computed from it."""
    waiting, known = [start], {start}
    while waiting:
        value = waiting.pop()
        yield value
        for node, _ in value.uses():
            fresh = [output for output in node.outputs if output not in known]
            known.update(fresh)
            waiting += fresh
