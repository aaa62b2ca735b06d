"""The graph of a bundle in standard operators, for a runtime that fuses for itself.

A bundle's own graph is fused for ONNX Runtime.  Where that left nothing but standard operators it is taken as it is;
else the rewrite is done again from the base graph, which the cache holds on the machine that exported the bundle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter, BaseReference
from deployfa.base_graphs import base_graph
from deployfa.bundle import Bundle
from deployfa.bundle.manifest import Tables
from deployfa.bundle.slots import idle_row
from deployfa.edits import Array
from deployfa.errors import BundleError, DeployfaError, InputError
from deployfa.graph import Plan, apply_adapter
from deployfa.graph.idle import adapted_branch
from deployfa.graph.row_defaults import attach_defaults, bake, default_strength, detach_defaults
from deployfa.graph.row_ops import add_slots, add_tables
from deployfa.graph.storage import load_graph

__all__ = ["Unfused", "unfused"]

_STANDARD = {"", "ai.onnx"}


@dataclass(frozen=True, eq=False)
class Unfused:
    """A graph of standard operators.

    defaults: inputs that a run need not feed, with their values: an adapter's strength, the slots of the base (zeros,
    and its own head), the tables of a pack.  rebuilt: whether the rewrite was done again.
    """

    model: ir.Model
    defaults: dict[str, Array]
    rebuilt: bool


def unfused(bundle: Bundle, *, model: str | Path | None = None, status: Callable[[str], None] | None = None) -> Unfused:
    """What ``bundle`` computes, before any fusion; with slots, the branch that reads them.

    Raises ``InputError`` for a patched bundle, and where the base graph is needed and cannot be made here.
    """
    if bundle.patch is not None:
        raise InputError("a patch has no graph of its own; export its adapter as a bundle: deployfa export --adapter")
    slots = bundle.manifest.slots
    graph = load_graph(bundle.graph)
    if slots is not None and slots.idle_branch:
        graph = adapted_branch(graph)
    rebuilt = not _standard(graph)
    if rebuilt:
        try:
            graph = _again(bundle, model, status)
        except DeployfaError as error:
            raise InputError(
                f"'{bundle.path}' is fused for ONNX Runtime, and its base graph cannot be had here ({error}); "
                "export it again with --optimize none"
            ) from error
    else:
        graph = graph.clone()
    defaults = detach_defaults(graph)
    names = {value.name for value in graph.graph.inputs}
    if slots is not None:
        defaults |= idle_row(bundle)
        defaults |= default_strength()
    defaults |= bundle.bound
    return Unfused(graph, {name: value for name, value in defaults.items() if name in names}, rebuilt)


def _standard(model: ir.Model) -> bool:
    return all(node.domain in _STANDARD for graph in model.graphs() for node in graph)


def _again(bundle: Bundle, model: str | Path | None, status: Callable[[str], None] | None) -> ir.Model:
    """The rewrite, from the base graph and what the manifest says was done."""
    manifest = bundle.manifest
    if manifest.tables is not None:
        adapter = _first(manifest.tables, manifest.base)
    else:
        adapter = dataclasses.replace(Adapter.load(bundle.adapter), base=manifest.base)
    graph = base_graph(adapter, model=model, status=status).load()
    if manifest.slots is not None:
        return add_slots(graph, manifest.slots.layout)
    if manifest.tables is None:
        return apply_adapter(graph, adapter, msgspec.convert(manifest.plan, Plan))
    tables = add_tables(graph, manifest.tables.layout)
    attach_defaults(tables, default_strength())
    if not manifest.tables.inputs:
        bake(tables, _baked(bundle))
    return tables


def _first(tables: Tables, base: BaseReference) -> Adapter:
    """What of a pack's first adapter decides which base graph it has: the modules it replaces, and how many labels."""
    modules = {
        path: {name: np.zeros(shape, np.float32) for name, shape in module.items()}
        for path, module in tables.replaced.items()
    }
    return Adapter("pack", {}, modules=modules, base=base, labels=tables.adapters[1].labels if modules else ())


def _baked(bundle: Bundle) -> dict[str, Array]:
    """The tables that are constants of a pack's graph."""
    assert bundle.manifest.tables is not None
    stored = load_graph(bundle.graph).graph.initializers
    values: dict[str, Array] = {}
    for name in bundle.manifest.tables.layout.shapes():
        tensor = stored[name].const_value if name in stored else None
        if tensor is None:
            raise BundleError(f"the graph of '{bundle.path}' has no table '{name}'; pack it again")
        values[name] = np.asarray(tensor.numpy())
    return values
