"""``deployfa plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Print where each edit would go, why, and what it costs at run time; nothing is written."""
    from deployfa.adapter import Adapter
    from deployfa.pipeline import plan_adapter

    with spinner("planning") as status:
        planned, base = plan_adapter(
            Adapter.load(adapter),
            model=model,
            placement=placement,
            prefer=prefer,
            untie=untie,
            require_fold=require_fold,
            allow_base_mismatch=allow_base_mismatch,
            status=status,
        )
    warn(base.warnings)
    if json:
        print_json(planned)
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
