"""``deployfa bench``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from deployfa.cli.console import print_json, progress_bar, recorded, show
from deployfa.cli.options import EngineOption, Force, Json, ModelOption, TargetOption, Threads, parse_shapes
from deployfa.errors import InputError

__all__ = ["bench"]


def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle directories.", show_default=False)],
    shapes: Annotated[
        str | None,
        typer.Option(
            "--shapes",
            help="BATCHxSEQUENCE,... Of bundles that generate: BATCHxPROMPT.  [default: 1x128,8x128; 1x32,4x32,16x32]",
        ),
    ] = None,
    against: Annotated[
        str, typer.Option("--against", help="base, torch, FILE.onnx,...: the first is what ratios refer to.")
    ] = "",
    target: TargetOption = None,
    engine: EngineOption = None,
    threads: Threads = None,
    spinning: Annotated[
        Literal["on", "off", "both"],
        typer.Option("--spinning", help="Idle threads burn their core (ORT's default: on)."),
    ] = "off",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=11,
            help="Per contender and shape; 662 for p99.  [default: 130; 15 generations]",
        ),
    ] = None,
    launches: Annotated[int, typer.Option("--launches", min=1, help="Processes per contender.")] = 5,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, help="Of each generation.")] = 64,
    max_seconds: Annotated[
        float | None,
        typer.Option("--max-seconds", min=1, help="Per shape, all contenders together. Default: 60; not of answers."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs and of the order.")] = 0,
    model: ModelOption = None,
    samples_out: Annotated[Path | None, typer.Option("--samples-out", help="Write the raw samples as JSON.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Time bundles, interleaved, each in its own process, with an interval on every ratio.

    Example: deployfa bench vefa.bundle --against base,torch --shapes 1x128,8x128

    Bundles that generate, whole answers: deployfa bench smol.bundle --against torch --shapes 1x32,4x32 --new-tokens 64
    """
    from deployfa.bundle import Bundle
    from deployfa.contenders import collect, forget_scratch, summaries

    names = [name for name in against.split(",") if name]
    # against a graph, a step of a decoder is timed like any other run
    if set(names) <= {"torch"} and _generate(bundles):
        from deployfa.cli.bench_generation import bench_generation

        unknown = {"--engine": engine, "--samples-out": samples_out, "--max-seconds": max_seconds}
        for option, given in unknown.items():
            if given is not None:
                raise InputError(f"whole answers are timed --samples times; leave {option} out, or pass --against base")
        bench_generation(
            bundles,
            parse_shapes(shapes or "1x32,4x32,16x32"),
            torch=bool(names),
            target=target,
            threads=threads,
            spinning=spinning,
            samples=samples or 15,
            launches=launches,
            new_tokens=new_tokens,
            seed=seed,
            model=model,
            json=json,
        )
        return
    first = Bundle.open(bundles[0], check_files=False).manifest
    sizes = parse_shapes(shapes or "1x128,8x128", first.preprocessing.kind)
    with tempfile.TemporaryDirectory(prefix="deployfa-base-") as scratch, progress_bar() as progress:
        from deployfa.bench import bench as run_bench

        opened, contenders = collect(bundles, names, Path(scratch), model=model, target=target, engine=engine)
        report = run_bench(
            contenders,
            sizes,
            threads=threads,
            spinning=spinning,
            launches=launches,
            min_samples=samples or 130,
            max_seconds_per_shape=max_seconds if max_seconds is not None else 60.0,
            seed=seed,
            progress=lambda what, share: progress("benching", round(100 * share), 100),
            samples_out=samples_out,
            force=force,
        )
    report = forget_scratch(report, Path(scratch))
    for bundle, summary in summaries(opened, report):
        recorded(bundle, bench=summary)
    if json:
        print_json(report)
    else:
        from deployfa.bench.table import render

        show(render(report))


def _generate(bundles: list[Path]) -> bool:
    """Whether all of them generate."""
    from deployfa.bundle import Bundle

    opened = [Bundle.open(path, check_files=False) for path in bundles]
    return all(each.manifest.base.task == "text-generation" for each in opened)
