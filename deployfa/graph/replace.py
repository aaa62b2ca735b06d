"""Replace whole modules (a classifier head): their parameters in the graph become the adapter's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.errors import EditError, SiteError
from deployfa.graph.floats import in_floats
from deployfa.graph.own_weight import set_bias, write_weight
from deployfa.graph.sites import Site, module_path
from deployfa.graph.tensors import cast_once, set_operand
from deployfa.naming import TRANSPOSED

__all__ = ["replace_module"]


def replace_module(graph: ir.Graph, sites: Mapping[str, Site], path: str, parameters: Mapping[str, Array]) -> None:
    """Write ``parameters`` (as PyTorch names and shapes them) over those of module ``path``; a quantised module becomes
    a floating-point one, because the adapter brings floats.

    Raises ``EditError`` when a shape differs from the base's and ``SiteError`` when a parameter has no place.
    """
    site = sites.get(path)
    if site is not None and site.weight.quantised:
        site = Site(path, tuple(in_floats(graph, use) for use in site.uses))
    for name, array in parameters.items():
        stored = graph.initializers.get(f"{path}.{name}")
        if site is not None and name == "weight":
            _set_weight(graph, site, array)
        elif site is not None and name == "bias":
            if array.shape != (site.out_features,):
                raise EditError(_differs(path, name, array.shape, (site.out_features,)))
            for use in site.uses:
                set_bias(graph, site, use, array.astype(np.float64) * use.beta)
        elif stored is not None:
            _set_stored(graph, path, name, stored, array)
        else:
            raise SiteError(f"module '{path}' has no parameter '{name}' in this graph; the base model is another one")


def _set_stored(graph: ir.Graph, path: str, name: str, stored: ir.Value, array: Array) -> None:
    """A parameter of any other module, under its own name.  The exporter merges equal ones (two norms, both at their
    start values, are one initializer), so what other modules read stays theirs."""
    if stored.shape is None or tuple(stored.shape) != array.shape:
        raise EditError(_differs(path, name, array.shape, stored.shape))
    readers = list(stored.uses())
    ours = [use for use in readers if f"{module_path(use.node)}.".startswith(f"{path}.")]
    if not ours and len(readers) > 1:
        raise SiteError(f"'{path}.{name}' is read by nodes of other modules only; export the base model again")
    value = cast_once(array.astype(np.float64), stored.dtype, path)
    for use in ours or readers:
        set_operand(graph, [use.node], use.idx, value, name=f"{path}.{name}")


def _set_weight(graph: ir.Graph, site: Site, array: Array) -> None:
    """A layer's weight: verbatim when the graph kept PyTorch's layout, else transposed.

    The initializer's name says which (see ``TRANSPOSED``; ``.weight`` is the parameter itself), so a square weight
    cannot be written the wrong way round; another name is refused.
    """
    given = site.weight.name
    transposed = site.layout == "kd" and given.endswith(TRANSPOSED)
    if site.layout == "kd" and not transposed and not given.endswith(".weight"):
        # a graph from elsewhere: the shape says it, unless it is square
        if site.in_features == site.out_features:
            raise SiteError(
                f"module '{site.path}': the name '{given}' does not say which way its square weight lies; "
                "export the base graph with deployfa export"
            )
        transposed = array.shape == site.shape[::-1]
    stored = array.T if transposed else array
    if stored.shape != site.shape:
        want = site.shape[::-1] if transposed else site.shape
        raise EditError(_differs(site.path, "weight", array.shape, want))
    write_weight(graph, site, stored)


def _differs(path: str, name: str, have: object, want: object) -> str:
    return f"module '{path}': {name} has shape {have}, the graph's has {want}; another number of labels?"
