"""Follow an edit upstream: from the input of a site to the norm or the layer that could make T(x) itself.

A path is a promise with conditions: every value on it changes, so everything that reads such a value must be on a path
that asks for the same change.  ``deployfa.graph.upstream`` checks that for all sites together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deployfa.edits import Edit
from deployfa.graph.backwards import backwards
from deployfa.graph.carry import Blocked, Carried
from deployfa.graph.layers import Use
from deployfa.graph.norm import Norm, find_norm
from deployfa.graph.sites import Site

__all__ = ["Path", "paths"]

#: How many nodes may stand between a norm or a layer and the site that it feeds.
_DEPTH = 40


@dataclass(frozen=True, eq=False)
class Path:
    """How ``use`` gets T(x) from ``end``.

    ``maker``: the value that ``end`` makes, ``change`` what must become of it; ``values``: what must become of every
    value from there to the site's input; ``edges``: (node, input index) of every read on the way, the site's included.
    """

    use: Use
    end: Norm | Use
    maker: ir.Value
    change: Carried
    values: Mapping[ir.Value, Carried]
    edges: frozenset[tuple[ir.Node, int]]
    through: tuple[str, ...]

    @property
    def kind(self) -> str:
        return "norm" if isinstance(self.end, Norm) else "producer"


def paths(site: Site, edit: Edit, makers: Mapping[ir.Value, Use]) -> list[list[Path]]:
    """For each use of ``site`` the paths that exist, nearest first; ``makers``: output of a layer → the layer.

    Raises ``Blocked`` with the reason if a use has none.
    """
    if edit.input_low_rank is not None or edit.output_low_rank is not None:
        raise Blocked("low rank mixes features, a norm or the rows of a layer have one scale each")
    if edit.output_scale is not None:
        raise Blocked("it scales what comes out of the layer too")
    return [_of_use(use, _wanted(use, edit), makers) for use in site.uses]


def _wanted(use: Use, edit: Edit) -> Carried:
    """T as a change of the site's input."""
    value, k = use.input, use.features("in")
    if value.shape is None:
        raise Blocked("the shape of the input is not known")
    rank = len(value.shape)
    shape, axis = [1] * rank, 1 if use.convolves else rank - 1
    if isinstance(value.shape[axis], int) and value.shape[axis] != k:
        raise Blocked("the shape of the input does not fit the weight")
    shape[axis] = k
    factor = np.ones(k) if edit.lam is None else 1.0 + edit.lam.astype(np.float64)
    shift = None if edit.delta is None else edit.delta.astype(np.float64).reshape(shape)
    return Carried(factor.reshape(shape), shift)


def _of_use(use: Use, wanted: Carried, makers: Mapping[ir.Value, Use]) -> list[Path]:
    if use.integer:
        raise Blocked("input is quantised on the way, which a scale does not pass exactly")
    edges = set(use.reads)
    values = {use.input: wanted}
    if use.dynamic is not None:
        # the quantizer follows its input: what it makes changes with it
        quantizer = use.dynamic.quantizer
        edges.add((quantizer, 0))
        values |= dict.fromkeys(quantizer.outputs, wanted)
    reasons: list[str] = []
    found = list(_search(use, use.input, values, frozenset(edges), (), makers, reasons))
    if not found:
        raise Blocked(reasons[0] if reasons else "input comes from no norm and no layer")
    return found


def _search(
    use: Use,
    value: ir.Value,
    values: dict[ir.Value, Carried],
    edges: frozenset[tuple[ir.Node, int]],
    through: tuple[str, ...],
    makers: Mapping[ir.Value, Use],
    reasons: list[str],
) -> Iterator[Path]:
    carried, node = values[value], value.producer()
    if node is None:
        reasons.append("input is a graph input" if value.is_graph_input() else "input is stored in the graph")
        return
    norm = find_norm(value, carried)
    end = norm or makers.get(value)
    if end is not None:
        yield Path(use, end, value, carried, values, edges, through)
        return
    if len(through) >= _DEPTH:
        reasons.append("no norm and no layer is near")
        return
    try:
        steps = backwards(node, value, carried)
    except Blocked as blocked:
        reasons.append(str(blocked))
        return
    for index, change in steps:
        source = node.inputs[index]
        if source is None or source in values:
            continue
        yield from _search(
            use,
            source,
            {**values, source: change},
            edges | {(node, index)},
            (*through, node.op_type),
            makers,
            reasons,
        )
