"""What is in an adapter file, or in a bundle of one: what ``deployfa inspect`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from deployfa.adapter import Adapter, BaseReference
from deployfa.bundle import Bundle
from deployfa.bundle.manifest import Slots
from deployfa.errors import InputError

__all__ = [
    "InspectedModule",
    "InspectedSite",
    "InspectedSlots",
    "Inspection",
    "inspect_adapter",
    "inspect_bundle",
]


class InspectedSite(msgspec.Struct, frozen=True, kw_only=True):
    """One site; ``distance`` is how far its edit is from the identity (see ``Edit.distance``)."""

    site: str
    edit: str
    tensors: dict[str, list[int]]
    parameters: int
    distance: float


class InspectedModule(msgspec.Struct, frozen=True, kw_only=True):
    """One replaced module."""

    path: str
    tensors: dict[str, list[int]]
    parameters: int


class InspectedSlots(msgspec.Struct, frozen=True, kw_only=True):
    """What else a bundle takes at a call: inputs of so many bytes, low ranks and labels up to so many."""

    tensors: dict[str, list[int]]
    bytes: int
    max_rank: int
    max_labels: int
    idle_branch: bool
    bases: list[str]


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``inspect --json``."""

    path: str
    found: str
    method: str
    base: BaseReference
    labels: list[str]
    parameters: int
    module_parameters: int
    distance: float
    sites: list[InspectedSite]
    modules: list[InspectedModule]
    training: dict[str, Any]
    slots: InspectedSlots | None = None


def inspect_bundle(path: Path) -> Inspection:
    """The adapter in the bundle at ``path``, and its slots if it has any.

    Raises ``InputError`` for a pack, which has many.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    if manifest.tables is not None:
        names = ", ".join(member.name for member in manifest.tables.adapters[:6])
        raise InputError(
            f"'{path}' is a pack of {len(manifest.tables.adapters)} rows ({names}, …); inspect one adapter"
        )
    found = inspect_adapter(str(path), Adapter.load(bundle.adapter))
    slots = None if manifest.slots is None else _slots(manifest.slots)
    return msgspec.structs.replace(found, found="in a bundle", labels=bundle.labels, slots=slots)


def _slots(slots: Slots) -> InspectedSlots:
    layout = slots.layout
    return InspectedSlots(
        tensors={name: list(shape) for name, shape in layout.shapes().items()},
        bytes=layout.row_bytes,
        max_rank=max((low.rank for low in layout.low_ranks), default=0),
        max_labels=layout.heads[-1].out_features if layout.heads else 0,
        idle_branch=slots.idle_branch,
        bases=list(layout.fingerprints),
    )


def inspect_adapter(path: str, adapter: Adapter) -> Inspection:
    """Sites, shapes, parameters, base, head, and how far each edit is from the identity."""
    sites = [
        InspectedSite(
            site=site,
            edit=_describe(edit.tensors().keys()),
            tensors={name: list(array.shape) for name, array in edit.tensors().items() if array.ndim},
            parameters=edit.parameters,
            distance=edit.distance(),
        )
        for site, edit in adapter.edits.items()
    ]
    modules = [
        InspectedModule(
            path=module,
            tensors={name: list(array.shape) for name, array in parameters.items()},
            parameters=sum(array.size for array in parameters.values()),
        )
        for module, parameters in adapter.modules.items()
    ]
    mean = sum(site.distance for site in sites) / len(sites) if sites else 0.0
    return Inspection(
        path=path,
        found=adapter.found,
        method=adapter.method,
        base=adapter.base,
        labels=list(adapter.labels),
        parameters=adapter.parameters,
        module_parameters=adapter.module_parameters,
        distance=mean,
        sites=sites,
        modules=modules,
        training=dict(adapter.training),
    )


def _describe(names: Any) -> str:
    words = {
        "lambda": "Scale(1+λ)",
        "A": "LowRank on the input",
        "delta": "Shift(δ)",
        "out_A": "LowRank on the output",
        "out_lambda": "Scale(1+λ) on the output",
    }
    return " + ".join(word for name, word in words.items() if name in names) or "identity"
