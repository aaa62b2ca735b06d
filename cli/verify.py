"""``deployfa verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployfa.cli.console import print_json, recorded, show, spinner
from deployfa.cli.options import EngineOption, Json, ModelOption, PatchOption, TargetOption

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.", show_default=False)],
    patch: PatchOption = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="With --patch and PyTorch: what the patch was made from.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="CSV or JSONL rows to compare on.")] = None,
    model: ModelOption = None,
    torch: Annotated[
        bool | None,
        typer.Option(
            "--torch/--no-torch", help="Compare with PyTorch, or with the stored reference. Default: if here."
        ),
    ] = None,
    target: TargetOption = None,
    engine: EngineOption = None,
    max_rows: Annotated[int, typer.Option("--max-rows", min=1, help="Rows of --data to use, from the top.")] = 500,
    json: Json = False,
) -> None:
    """Prove a bundle equal to the PyTorch model with the unfolded adapter.  Exit 0 equal, 1 not.

    Example: deployfa verify vefa.bundle --data test.csv
    """
    from deployfa.adapter import Adapter
    from deployfa.bundle import Bundle
    from deployfa.data import read_rows
    from deployfa.parity import verify as run_verify

    opened = Bundle.open(bundle, patch=patch)
    loaded = Adapter.load(adapter) if adapter is not None else None
    rows = read_rows(data, need_label=False)[:max_rows] if data is not None else None
    with spinner("verifying") as status:
        report = run_verify(
            opened, rows=rows, model=model, adapter=loaded, use_torch=torch, target=target, engine=engine, status=status
        )
    recorded(opened, parity=report.summary())
    if json:
        print_json(report)
    else:
        from deployfa.parity.table import render

        show(*render(report))
    if not report.passed:
        raise typer.Exit(1)
