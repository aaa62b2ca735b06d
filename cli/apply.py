"""``deployfa apply``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployfa.cli.console import done, print_json, show, spinner
from deployfa.cli.options import (
    AdapterOption,
    Force,
    Json,
    PlacementOption,
    PreferOption,
    RequireFold,
    StrengthOption,
    Untie,
)
from deployfa.cli.plan import plan_table

__all__ = ["apply"]


def apply(
    graph: Annotated[Path, typer.Argument(help="An .onnx graph of the base model, from any exporter.")],
    adapter: AdapterOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    sites: Annotated[
        Path | None,
        typer.Option("--sites", help='JSON: {"site": "initializer or node name"}, where names do not say it.'),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Directory of the base model: find sites by comparing weights.")
    ] = None,
    placement: PlacementOption = "auto",
    prefer: PreferOption = "smallest-patch",
    untie: Untie = False,
    require_fold: RequireFold = False,
    strength: StrengthOption = 1.0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Place an adapter on a graph that another exporter made: Optimum, torch.onnx, a vendor, a quantiser.

    Example: deployfa apply model_int8.onnx --adapter vefa.pt --out adapted
    """
    from deployfa.adapter import Adapter
    from deployfa.apply import ApplyReport, apply_to_graph, read_site_names
    from deployfa.convert import with_strength

    named = read_site_names(sites) if sites is not None else None
    loaded = with_strength(Adapter.load(adapter), strength)
    with spinner("applying") as status:
        applied = apply_to_graph(
            graph,
            loaded,
            out,
            named=named,
            model=model,
            placement=placement,
            prefer=prefer,
            untie=untie,
            require_fold=require_fold,
            force=force,
            status=status,
        )
    if json:
        print_json(ApplyReport(out=str(out), sites=applied.located, plan=applied.plan))
        return
    from rich.table import Table

    table = Table(title="Sites")
    for column in ("site", "found by", "weight in the graph", "nodes"):
        table.add_column(column)
    for site in applied.located:
        table.add_row(site.site, site.how, site.weight, ", ".join(site.nodes))
    show(table, *plan_table(applied.plan))
    done(f"wrote '{out}': model.onnx, plan.json, sites.json (pass it to --sites to find them so again)")
