"""What a bundle with slots holds: its runner, the adapter it came with, and the base that it is without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deployfa.adapter import Adapter
from deployfa.bundle.bundle import Bundle
from deployfa.bundle.manifest import Slots
from deployfa.edits import Array
from deployfa.errors import BundleError, InputError
from deployfa.graph.storage import load_graph
from deployfa.runtimes.onnx_adapter import read_onnx_adapter
from deployfa.runtimes.slots import SlotAdapter, SlotRunner
from deployfa.tables import Layout
from deployfa.tables.row_edits import row_edits

__all__ = ["idle_row", "known_labels", "load_file", "row_adapter", "slots_of"]


def slots_of(bundle: Bundle) -> Slots:
    """Raises ``InputError`` for a bundle that has none."""
    slots = bundle.manifest.slots
    if slots is None:
        raise InputError(f"'{bundle.path}' has no slots for another adapter; export it with --slots")
    return slots


def load_file(bundle: Bundle, runner: SlotRunner, path: Path) -> SlotAdapter:
    """An ``.onnx_adapter`` file with what its answers mean, where it says so or that can be known."""
    loaded = runner.load(path)
    return dataclasses.replace(loaded, labels=loaded.labels or known_labels(bundle, loaded.row))


def known_labels(bundle: Bundle, row: Mapping[str, Array]) -> tuple[str, ...]:
    """What the answers of ``row`` mean if it has the head of the bundle's adapter or of the base, or if there are no
    heads; empty if not."""
    slots = slots_of(bundle)
    names = [name for head in slots.layout.heads for name in (head.weight_name, head.bias_name)]
    own = read_onnx_adapter(bundle.path / slots.file, slots.layout, idle_branch=slots.idle_branch)
    for known, labels in ((own, bundle.labels), (idle_row(bundle), slots.labels)):
        if all(np.array_equal(known[name], row[name]) for name in names):
            return tuple(labels)
    return ()


def idle_row(bundle: Bundle) -> dict[str, Array]:
    """The row that a run without an adapter has: zeros, and the base's own heads."""
    stored = load_graph(bundle.graph).graph.initializers
    row: dict[str, Array] = {}
    for name in slots_of(bundle).layout.shapes():
        tensor = stored[name].const_value if name in stored else None
        if tensor is None:
            raise BundleError(f"the graph of '{bundle.path}' has no default for '{name}'; export it again")
        row[name] = np.array(tensor.numpy())
    return row


def row_adapter(adapter: Adapter, layout: Layout, row: Mapping[str, Array]) -> Adapter:
    """``row`` as an adapter: its edits, and its numbers in the modules that ``adapter`` replaces (so that both are of
    one fingerprint).  The base's row has no edits and the base's own numbers."""
    heads = {head.site: head for head in layout.heads}
    modules: dict[str, dict[str, Array]] = {}
    for module, parameters in adapter.modules.items():
        for name in parameters:
            path, _, parameter = f"{module}.{name}".rpartition(".")
            bias = row[heads[path].bias_name]
            kept = ~np.isneginf(bias)
            value = bias[kept] if parameter == "bias" else row[heads[path].weight_name].T[kept]
            modules.setdefault(module, {})[name] = np.ascontiguousarray(value)
    return dataclasses.replace(adapter, edits=row_edits(row, layout), modules=modules, labels=())
