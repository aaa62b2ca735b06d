"""``deployfa demo`` and ``deployfa report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployfa.cli.console import done, print_json, show
from deployfa.cli.options import Force, Json

__all__ = ["demo", "report"]


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Everything lands here.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option("--seed", help="Of the data split and of training.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train, export, verify, bench and run a real model on real text; end with one table and an HTML page."""
    from deployfa.demo import run_demo
    from deployfa.report.page import write_page
    from deployfa.report.table import render

    result = run_demo(out, seed=seed, force=force, say=lambda line: done(f"\n{line}"))
    page = write_page(result, out / "report.html", force=True)
    if json:
        print_json(result)
    else:
        show(*render(result))
    done(f"page: {page}")


def report(
    file: Annotated[Path, typer.Argument(help="A report.json of the demo.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: report.html beside it.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables; write no page.")] = False,
    force: Force = False,
) -> None:
    """Draw the HTML page of a demo's report.json again."""
    from deployfa.report.page import read_report, write_page
    from deployfa.report.table import render

    result = read_report(file)
    if markdown:
        from deployfa.report.markdown import render as render_markdown

        typer.echo(render_markdown(result))
        return
    page = write_page(result, out if out is not None else file.with_suffix(".html"), force=force)
    show(*render(result))
    done(f"page: {page}")
