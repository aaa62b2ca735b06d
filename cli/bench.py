"""``deployfa bench``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from deployfa.cli.console import print_json, progress_bar, recorded, show
from deployfa.cli.options import EngineOption, Force, Json, ModelOption, TargetOption, Threads, parse_shapes

__all__ = ["bench"]


def bench(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle directories.", show_default=False)],
    shapes: Annotated[str, typer.Option("--shapes", help="BATCHxSEQUENCE,...")] = "1x128,8x128",
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
    samples: Annotated[int, typer.Option("--samples", min=11, help="Per contender and shape; 662 for p99.")] = 130,
    launches: Annotated[int, typer.Option("--launches", min=1, help="Processes per contender.")] = 5,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", min=1, help="Per shape, all contenders together.")
    ] = 60,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs and of the order.")] = 0,
    model: ModelOption = None,
    samples_out: Annotated[Path | None, typer.Option("--samples-out", help="Write the raw samples as JSON.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Time bundles, interleaved, each in its own process, with an interval on every ratio.

    Example: deployfa bench vefa.bundle --against base,torch --shapes 1x128,8x128
    """
    from deployfa.contenders import collect, forget_scratch, summaries

    sizes = parse_shapes(shapes)
    with tempfile.TemporaryDirectory(prefix="deployfa-base-") as scratch, progress_bar() as progress:
        from deployfa.bench import bench as run_bench

        opened, contenders = collect(
            bundles, [a for a in against.split(",") if a], Path(scratch), model=model, target=target, engine=engine
        )
        report = run_bench(
            contenders,
            sizes,
            threads=threads,
            spinning=spinning,
            launches=launches,
            min_samples=samples,
            max_seconds_per_shape=max_seconds,
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
