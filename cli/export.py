"""``deployfa export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from deployfa.cli.console import done, print_json, show, spinner, warn
from deployfa.cli.export_patch import export_patch
from deployfa.cli.options import (
    AdapterOption,
    AllowMismatch,
    Force,
    Json,
    ModelOption,
    PlacementOption,
    PreferOption,
    RequireFold,
    StrengthOption,
    Threads,
    Untie,
    parse_shapes,
)

if TYPE_CHECKING:
    from rich.table import Table

    from deployfa.bundle.manifest import FusedCount, Optimization

__all__ = ["ExportReport", "export", "fused_table", "tried_table"]


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``export --json``."""

    bundle: str
    manifest: dict[str, Any]
    ran_torch: bool
    warnings: list[str]


def export(
    adapter: AdapterOption,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The bundle. Default: the adapter's name.")] = None,
    model: ModelOption = None,
    target: Annotated[str, typer.Option("--target", help="Runtime and provider.")] = "onnxruntime-cpu",
    optimize: Annotated[
        str, typer.Option("--optimize", help="auto times every fusion and keeps the fastest; or none, ort, onnxscript.")
    ] = "auto",
    placement: PlacementOption = "auto",
    prefer: PreferOption = "smallest-patch",
    untie: Untie = False,
    require_fold: RequireFold = False,
    strength: StrengthOption = 1.0,
    shapes: Annotated[
        str, typer.Option("--shapes", help="BATCHxSEQUENCE,... that --optimize auto times.")
    ] = "1x128,8x128",
    delta: Annotated[
        Path | None,
        typer.Option(
            "--delta",
            help="Write a patch for this bundle: only the tensors that the adapter changes. "
            "A bundle that is not there is written first, from the base alone.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Texts for the stored reference outputs.")] = None,
    threads: Threads = None,
    force: Force = False,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Put an adapter into production: fold it, fuse the graph, write a bundle.

    Example: deployfa export --adapter vefa.pt --out vefa.bundle

    A fleet gets the base once and then a patch for each adapter: deployfa export --adapter vefa.pt --delta fleet.bundle
    --out vefa.patch
    """
    from deployfa.adapter import Adapter
    from deployfa.atomic import check_output
    from deployfa.convert import with_strength
    from deployfa.data import read_rows
    from deployfa.pipeline import export as run_export

    loaded = with_strength(Adapter.load(adapter), strength)
    out = out if out is not None else adapter.with_name(f"{adapter.stem}.{'bundle' if delta is None else 'patch'}")
    check_output(out, force=force)
    options: dict[str, Any] = {
        "model": model,
        "target": target,
        "optimize": optimize,
        "placement": placement,
        "prefer": prefer,
        "untie": untie,
        "require_fold": require_fold,
        "shapes": parse_shapes(shapes),
        "rows": read_rows(data, need_label=False) if data is not None else None,
        "threads": threads,
        "force": force,
        "allow_base_mismatch": allow_base_mismatch,
    }
    if delta is not None:
        export_patch(loaded, delta, out, options, json=json)
        return
    with spinner("exporting") as status:
        exported = run_export(loaded, out, **options, status=status)
    warn(exported.warnings)
    manifest = exported.bundle.manifest
    if json:
        print_json(
            ExportReport(
                bundle=str(out),
                manifest=msgspec.to_builtins(manifest),
                ran_torch=exported.ran_torch,
                warnings=list(exported.warnings),
            )
        )
        return
    plan = exported.plan
    show(
        f"{len(plan.edits)} edits: {plan.folded} folded, {plan.count('side op')} side ops "
        f"({plan.extra_flops_per_token:,} extra FLOPs per token)"
    )
    show(tried_table(manifest.optimization))
    if manifest.fusions:
        show(fused_table(manifest.fusions))
    done(f"wrote '{out}' ({manifest.graph.bytes / 1e6:.1f} MB); next: deployfa verify {out}")


def tried_table(optimization: Optimization) -> Table:
    """What was timed and what was taken."""
    from rich.table import Table

    table = Table(title="Fusions tried")
    for column in ("fusion", *(f"{shape} p50 (ms)" for shape in optimization.shapes), "error", "verdict"):
        table.add_column(column, justify="left" if column in {"fusion", "verdict"} else "right")
    for tried in optimization.tried:
        times = [f"{tried.median_ms[s]:.2f}" if s in tried.median_ms else "–" for s in optimization.shapes]
        verdict = tried.refused or ("chosen" if tried.name == optimization.chosen else "slower")
        table.add_row(tried.name, *times, f"{tried.error:.1e}" if tried.error is not None else "–", verdict)
    return table


def fused_table(fusions: Mapping[str, FusedCount]) -> Table:
    """The runtime's fused operators, before and after the adapter."""
    from rich.table import Table

    table = Table(title="Fused operators of the session")
    for column in ("operator", "base", "with the adapter", "verdict"):
        table.add_column(column, justify="left" if column in {"operator", "verdict"} else "right")
    for name, count in fusions.items():
        change = count.adapted - count.base
        verdict = "kept" if not change else f"{-change} lost" if change < 0 else f"{change} more"
        table.add_row(name, str(count.base), str(count.adapted), verdict)
    return table
