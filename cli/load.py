"""``deployfa load``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployfa.cli.console import print_json, progress_bar, show, warn
from deployfa.cli.options import Force, Json
from deployfa.errors import InputError

if TYPE_CHECKING:
    from deployfa.load import LoadReport, RateReport

__all__ = ["load"]

_INTERRUPTED = 130


def load(
    url: Annotated[str, typer.Argument(help="A server, such as http://localhost:8000.", show_default=False)],
    rate: Annotated[
        float, typer.Option("--rate", "-r", help="Requests a second; arrivals are a Poisson process.")
    ] = 200,
    duration: Annotated[float, typer.Option("--duration", "-d", help="Seconds that are measured.")] = 30,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Of the server. Default: the only one that is ready.")
    ] = None,
    adapters: Annotated[
        str | None,
        typer.Option("--adapters", help="zipf:1.1:1000 (exponent, how many), uniform:16, or names: a,b,c."),
    ] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="Of the adapters: 0 is the base, 1 all.")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text; may be given several times.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="CSV or JSONL with a text column.")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Without texts: raw tensors of so many tokens. Default: 16.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Rows of raw tensors a request. Default: 1.")] = None,
    slo_ms: Annotated[float | None, typer.Option("--slo-ms", help="The latency objective in milliseconds.")] = None,
    find_rate: Annotated[
        bool, typer.Option("--find-rate", help="Find the highest rate within --slo-ms, in steps of --duration.")
    ] = False,
    slo_quantile: Annotated[
        float, typer.Option("--slo-quantile", help="Of --find-rate: the share that must be within --slo-ms.")
    ] = 0.99,
    warmup: Annotated[float, typer.Option("--warmup", help="Seconds of the same load before, not counted.")] = 2,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds until a request is given up.")] = 10,
    max_connections: Annotated[
        int | None,
        typer.Option("--max-connections", help="Requests above it wait here, counted as late. Default: no limit."),
    ] = None,
    token: Annotated[str | None, typer.Option("--token", help="Sent as Authorization: Bearer.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of send times, inputs and adapters.")] = 0,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="Exit status 1 if a request failed; being shed is no failure.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the report as JSON.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Send load to a server of the Open Inference Protocol (v2, REST): each request at its time, whatever came before.

    Latency counts from when a request should have been sent, so that a stall shows in all requests that met it.

    Example: deployfa load http://localhost:8000 --rate 500 --adapters zipf:1.1:1000 --slo-ms 50

    How much it can take: deployfa load http://localhost:8000 --slo-ms 50 --find-rate --duration 10

    Ctrl-C ends it early, prints the report of what was measured, and exits with status 130.
    """
    from deployfa.atomic import check_output
    from deployfa.data import read_rows
    from deployfa.load import LoadOptions, run_load
    from deployfa.load import find_rate as run_search
    from deployfa.load.adapters import AdapterSpec

    if out is not None:
        check_output(out, force=force)
    texts = list(text or [])
    if data is not None:
        texts += [row.text for row in read_rows(data, need_label=False)]
    if texts and (tokens is not None or batch is not None):
        raise InputError("texts and raw tensors were asked for; leave out --tokens and --batch, or --text and --data")
    options = LoadOptions(
        url=url,
        rate=rate,
        duration=duration,
        model=model,
        adapters=AdapterSpec.parse(adapters) if adapters is not None else None,
        texts=texts,
        tokens=16 if tokens is None else tokens,
        batch=1 if batch is None else batch,
        strength=strength,
        slo_ms=slo_ms,
        token=token,
        warmup=warmup,
        timeout=timeout,
        seed=seed,
        max_connections=max_connections,
    )
    report: LoadReport | RateReport
    # once a second: drawing the bar takes the interpreter from the requests
    with progress_bar(refreshes_per_s=1) as progress:
        if find_rate:
            report = run_search(options, quantile=slo_quantile, progress=progress)
        else:
            report = run_load(options, progress=progress)
    warn(report.warnings)
    _print(report, out=out, force=force, json=json)
    if report.interrupted:
        raise typer.Exit(_INTERRUPTED)
    if fail_on_error and _failed(report):
        raise typer.Exit(1)


def _print(report: LoadReport | RateReport, *, out: Path | None, force: bool, json: bool) -> None:
    import msgspec

    from deployfa.atomic import write_file
    from deployfa.load import RateReport
    from deployfa.load.table import render, render_rate

    if json:
        print_json(report)
    else:
        show(render_rate(report) if isinstance(report, RateReport) else render(report))
    if out is not None:
        with write_file(out, force=force) as partial:
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


def _failed(report: LoadReport | RateReport) -> bool:
    from deployfa.load import RateReport

    # a search goes where requests fail; it has failed if it found nothing
    return report.found_per_s is None if isinstance(report, RateReport) else report.failed > 0
