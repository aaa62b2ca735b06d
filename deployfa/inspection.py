"""What is in an adapter file: what ``deployfa inspect`` prints."""

from __future__ import annotations

from typing import Any

import msgspec

from deployfa.adapter import Adapter, BaseReference

__all__ = ["InspectedModule", "InspectedSite", "Inspection", "inspect_adapter"]


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
