"""``deployfa plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from deployfa.cli.console import print_json, show, spinner, warn
from deployfa.cli.options import (
    AdapterOption,
    AllowMismatch,
    Json,
    ModelOption,
    PlacementOption,
    PreferOption,
    RequireFold,
    Untie,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from deployfa.graph import Plan

__all__ = ["plan", "plan_table"]


def plan(
    adapter: AdapterOption,
    model: ModelOption = None,
    placement: PlacementOption = "auto",
    prefer: PreferOption = "smallest-patch",
    untie: Untie = False,
    require_fold: RequireFold = False,
    optimize: Annotated[
        str, typer.Option("--optimize", help="The fusion that the costs are counted for; auto: all of them.")
    ] = "auto",
    fusions: Annotated[
        bool, typer.Option("--fusions/--no-fusions", help="Count which of the runtime's fusions side ops would cost.")
    ] = True,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Print where each edit would go, why, and what it costs at run time; nothing is written.

    Side ops can keep the runtime from fusing operators.  A plan that has some is tried out, and a warning says which
    fusions it would lose.

    Example: deployfa plan --adapter vefa.pt --placement side-op
    """
    from deployfa.adapter import Adapter
    from deployfa.kept_fusions import plan_fusions
    from deployfa.pipeline import plan_adapter

    loaded = Adapter.load(adapter)
    with spinner("planning") as status:
        planned, base = plan_adapter(
            loaded,
            model=model,
            placement=placement,
            prefer=prefer,
            untie=untie,
            require_fold=require_fold,
            allow_base_mismatch=allow_base_mismatch,
            status=status,
        )
        costs = None
        if fusions:
            costs = plan_fusions(base.load(), loaded, planned, optimize=optimize, status=status)
    warn([*base.warnings, *(costs.warnings() if costs is not None else ())])
    if json:
        # the plan itself, so that it can be replayed, and beside its fields what it costs in fusions
        print_json({**msgspec.to_builtins(planned), "fusions": msgspec.to_builtins(costs)})
    else:
        show(*plan_table(planned))


def plan_table(planned: Plan) -> list[RenderableType]:
    """The table of placements and its totals."""
    from rich.table import Table

    table = Table(title="Plan")
    figures = ("extra FLOPs/token", "extra traffic (bytes/token)", "extra bytes", "changed bytes")
    for column in ("site", "op", "placement", "reason", *figures):
        table.add_column(column, justify="right" if column in figures else "left")
    for edit in planned.edits:
        costs = (edit.extra_flops_per_token, edit.extra_bytes_per_token, edit.extra_bytes, edit.patch_bytes)
        table.add_row(edit.site, edit.op, edit.placement, edit.reason, *(f"{cost:,}" for cost in costs))
    for module in planned.modules:
        reason = f"the adapter's own {', '.join(module.parameters)}"
        table.add_row(module.path, "–", "replaced", reason, "0", "0", "0", f"{module.bytes:,}")
    totals = (
        f"{len(planned.edits)} edits: {planned.folded} folded, {planned.count('side op')} side ops; "
        f"together {planned.extra_flops_per_token:,} extra FLOPs and {planned.extra_bytes_per_token:,} bytes of extra "
        f"traffic per token, {planned.extra_bytes:,} extra bytes in the graph, {planned.patch_bytes:,} bytes changed"
    )
    return [table, totals]
