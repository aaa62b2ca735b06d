"""``deployfa export --delta``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from deployfa.cli.console import done, print_json, show, spinner, warn

if TYPE_CHECKING:
    from deployfa.adapter import Adapter

__all__ = ["DeltaReport", "export_patch"]


class DeltaReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``export --delta --json``.  ``share`` is the patch's tensors over the graph's bytes; ``error`` and
    ``noise`` are relative to the float64 reference."""

    patch: str
    patch_bytes: int
    tensors: dict[str, list[int]]
    tensor_bytes: int
    bundle: str
    wrote_bundle: bool
    graph_bytes: int
    share: float
    fusion: str
    error: float
    noise: float
    plan: dict[str, Any]
    ran_torch: bool
    warnings: list[str]


def export_patch(adapter: Adapter, fleet: Path, out: Path, options: dict[str, Any], *, json: bool) -> None:
    """Write the patch, and the fleet's bundle if it is not there; print how small it is."""
    from deployfa.delta import export_delta

    with spinner("exporting") as status:
        made = export_delta(adapter, fleet, out, **options, status=status)
    warn(made.warnings)
    graph_bytes = made.bundle.manifest.graph.bytes
    size = out.stat().st_size
    meta = made.patch.meta
    if json:
        print_json(
            DeltaReport(
                patch=str(out),
                patch_bytes=size,
                tensors={name: list(array.shape) for name, array in made.patch.tensors.items()},
                tensor_bytes=made.patch.tensor_bytes,
                bundle=str(fleet),
                wrote_bundle=made.wrote_bundle,
                graph_bytes=graph_bytes,
                share=made.share,
                fusion=meta.fusion,
                error=meta.error,
                noise=meta.noise,
                plan=meta.plan,
                ran_torch=made.ran_torch,
                warnings=list(made.warnings),
            )
        )
        return
    if made.wrote_bundle:
        show(f"wrote '{fleet}' ({graph_bytes / 1e6:.1f} MB): the base with this adapter's head, for every patch")
    norms, weights = made.plan.count("norm"), made.plan.count("own weight")
    show(
        f"{len(made.patch.tensors)} tensors change ({weights} edits in their own weight, {norms} in a norm): "
        f"{made.patch.tensor_bytes / 1e3:.1f} KB of {graph_bytes / 1e3:,.1f} KB, {made.share:.2%} of the graph"
    )
    if weights and options["prefer"] != "smallest-patch":
        show("an own weight is the larger patch; --prefer smallest-patch changes norms instead where that is exact")
    show(
        f"patched session: equal to the full graph bit for bit; error {meta.error:.1e}, "
        f"{meta.error / meta.noise:.2f}x the float32 noise"
    )
    done(f"wrote '{out}' ({size / 1e3:.1f} KB); next: deployfa run {fleet} --patch {out} --text ...")
