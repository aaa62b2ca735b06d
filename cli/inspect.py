"""``deployfa inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployfa.cli.console import print_json, show
from deployfa.cli.options import Json

if TYPE_CHECKING:
    from deployfa.inspection import InspectedSlots

__all__ = ["inspect"]


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A .pt, a .safetensors, a PEFT directory, or a bundle.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """Print what is in an adapter: sites, shapes, parameters, base, head, distance from the identity.

    Of a bundle: its adapter, and its slots for others.  Example: deployfa inspect slots.bundle
    """
    from deployfa.adapter import Adapter
    from deployfa.bundle import MANIFEST
    from deployfa.inspection import inspect_adapter, inspect_bundle

    found = inspect_bundle(file) if (file / MANIFEST).is_file() else inspect_adapter(str(file), Adapter.load(file))
    if json:
        print_json(found)
        return
    from rich.table import Table

    table = Table(title=f"{found.method} adapter '{file}' ({found.found})")
    table.add_column("site")
    table.add_column("edit")
    table.add_column("shapes")
    table.add_column("parameters", justify="right")
    table.add_column("distance from identity (RMS)", justify="right")
    for site in found.sites:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in site.tensors.items())
        table.add_row(site.site, site.edit, shapes, f"{site.parameters:,}", f"{site.distance:.4f}")
    for module in found.modules:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in module.tensors.items())
        table.add_row(module.path, "replaced module", shapes, f"{module.parameters:,}", "–")
    base = found.base
    origin = f"{base.architecture or 'unknown architecture'} from '{base.name}'"
    sizes = f"{found.parameters:,} in {len(found.sites)} sites, {found.module_parameters:,} in replaced modules"
    show(
        table,
        f"base: {origin}, {base.fingerprint or 'no fingerprint'}",
        f"task: {base.task}; labels: {', '.join(found.labels) or 'none'}",
        f"parameters: {sizes}; mean distance from the identity {found.distance:.4f}",
    )
    if found.slots is not None:
        show(_described(found.slots))
    scores = found.training.get("scores")
    if isinstance(scores, dict):
        parts = [f"{name} {100 * value['balanced_accuracy']:.1f} %" for name, value in scores.items()]
        show(f"balanced accuracy after training: {', '.join(parts)}")


def _described(slots: InspectedSlots) -> str:
    each = ", ".join(f"{name} {tuple(shape)}" for name, shape in slots.tensors.items())
    inputs = each if len(slots.tensors) <= 8 else f"{len(slots.tensors)} inputs"
    idle = "the base graph beside them" if slots.idle_branch else "them with the identity in them"
    return (
        f"slots: {inputs}; {slots.bytes / 1e3:.1f} KB an adapter, low ranks up to {slots.max_rank}, labels up to "
        f"{slots.max_labels}; without an adapter it runs {idle}"
    )
