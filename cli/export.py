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
from deployfa.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from deployfa.bundle.manifest import FusedCount, Optimization, Slots

__all__ = ["ExportReport", "export", "fused_table", "slots_shown", "tried_table"]


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
        str,
        typer.Option("--optimize", help="auto times all and keeps the fastest; or none, ort, ort-sum, onnxscript."),
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
    slots: Annotated[
        bool,
        typer.Option("--slots", help="Make the adapter a set of inputs: another can be swapped in at every call."),
    ] = False,
    idle_branch: Annotated[
        bool,
        typer.Option(
            "--idle-branch/--no-idle-branch",
            help="With --slots: keep the base graph beside, so that no adapter costs nothing; twice the memory.",
        ),
    ] = True,
    max_rank: Annotated[int, typer.Option("--max-rank", min=0, help="With --slots: room for other low ranks.")] = 0,
    max_labels: Annotated[int, typer.Option("--max-labels", min=0, help="With --slots: room for other heads.")] = 0,
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

    One session for many: deployfa export --adapter vefa.pt --slots --out slots.bundle
    """
    from deployfa.adapter import Adapter
    from deployfa.atomic import check_output
    from deployfa.convert import with_strength
    from deployfa.pipeline import export as run_export
    from deployfa.runtimes.targets import is_engine
    from deployfa.slots import export_slots
    from deployfa.task_rows import rows_of
    from deployfa.tasks import task_of

    loaded = with_strength(Adapter.load(adapter), strength)
    out = out if out is not None else adapter.with_name(f"{adapter.stem}.{'bundle' if delta is None else 'patch'}")
    check_output(out, force=force)
    options: dict[str, Any] = {
        "model": model,
        "target": target,
        "optimize": optimize,
        "shapes": parse_shapes(shapes, task_of(loaded.base.task).kind),
        "rows": rows_of(task_of(loaded.base.task), data, need_label=False) if data is not None else None,
        "threads": threads,
        "force": force,
        "allow_base_mismatch": allow_base_mismatch,
    }
    placing: dict[str, Any] = {"placement": placement, "prefer": prefer, "untie": untie, "require_fold": require_fold}
    room: dict[str, Any] = {"idle_branch": idle_branch, "max_rank": max_rank, "max_labels": max_labels}
    _check_slots(slots, delta, placing, room)
    if delta is not None:
        export_patch(loaded, delta, out, {**options, **placing}, json=json)
        return
    with spinner("exporting") as status:
        if slots:
            exported = export_slots(loaded, out, **options, **room, status=status)
        else:
            exported = run_export(loaded, out, **options, **placing, status=status)
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
    if manifest.slots is not None:
        show(*slots_shown(manifest.slots, len(plan.edits)))
    else:
        show(
            f"{len(plan.edits)} edits: {plan.folded} folded, {plan.count('side op')} side ops "
            f"({plan.extra_flops_per_token:,} extra FLOPs per token)"
        )
    show(tried_table(manifest.optimization))
    if manifest.fusions:
        show(fused_table(manifest.fusions))
    step = f"deployfa compile {out} --target {target}" if is_engine(target) else f"deployfa verify {out}"
    done(f"wrote '{out}' ({manifest.graph.bytes / 1e6:.1f} MB); next: {step}")


def _check_slots(slots: bool, delta: Path | None, placing: dict[str, Any], room: dict[str, Any]) -> None:
    """Options that say nothing together are a slip: one line now, not a surprise later."""
    if not slots and (not room["idle_branch"] or room["max_rank"] or room["max_labels"]):
        raise InputError("--no-idle-branch, --max-rank and --max-labels are for --slots; add it, or leave them out")
    if not slots:
        return
    if delta is not None:
        raise InputError("--slots swaps adapters in one bundle, --delta patches one; pass either")
    default = {"placement": "auto", "prefer": "smallest-patch", "untie": False, "require_fold": False}
    if placing != default:
        raise InputError("--slots places every edit as an input; leave out the options that say where edits go")


def slots_shown(slots: Slots, edits: int) -> list[Any]:
    """What the slots hold, and how the branch that reads them was fused."""
    idle = "the base graph beside them, bit for bit" if slots.idle_branch else "themselves, with the identity in them"
    what = f"{edits} edits in {len(slots.layout.shapes())} inputs of {slots.layout.row_bytes / 1e3:.1f} KB"
    shown: list[Any] = [f"{what}; without an adapter the bundle runs {idle}"]
    return [*shown, tried_table(slots.active, title="Fusions tried, adapter active")] if slots.idle_branch else shown


def tried_table(optimization: Optimization, *, title: str = "Fusions tried") -> Table:
    """What was timed and what was taken."""
    from rich.table import Table

    table = Table(title=title)
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
