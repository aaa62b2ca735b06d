"""The Typer application; each command lives in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from deployfa.cli import (
    apply,
    bench,
    compile,
    convert,
    demo,
    doctor,
    export,
    fetch,
    inspect,
    load,
    merge,
    models,
    pack,
    plan,
    run,
    serve,
    train,
    verify,
)

__all__ = ["app"]

app = typer.Typer(
    name="deployfa",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, fold, verify, time and run feature-space adapters (VeFA, LoRFA) as ONNX.",
)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Train, fold, verify, time and run feature-space adapters (VeFA, LoRFA) as ONNX."""
    if version:
        import importlib.metadata

        typer.echo(f"deployfa {importlib.metadata.version('deployfa')}")
        raise typer.Exit


for command in (
    train.train,
    inspect.inspect,
    convert.convert,
    merge.merge,
    plan.plan,
    export.export,
    apply.apply,
    pack.pack,
    compile.compile_,
    verify.verify,
    bench.bench,
    load.load,
    run.run,
    serve.serve,
    demo.demo,
    demo.report,
    fetch.fetch,
    models.models,
    doctor.doctor,
):
    app.command(command.__name__.rstrip("_"))(command)
