"""``deployfa bench`` of bundles that generate: whole answers, against PyTorch's ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deployfa.cli.console import print_json, progress_bar, recorded, show
from deployfa.errors import InputError

if TYPE_CHECKING:
    from deployfa.bench import Shape
    from deployfa.bundle import Bundle
    from deployfa.generation.timing import GenerationContender

__all__ = ["bench_generation"]


def bench_generation(
    paths: Sequence[Path],
    shapes: Sequence[Shape],
    *,
    torch: bool,
    target: str | None,
    threads: int | None,
    spinning: str,
    samples: int,
    launches: int,
    new_tokens: int,
    seed: int,
    model: str | None,
    json: bool,
) -> None:
    """Time ``paths``, after PyTorch with the first one's adapter if ``torch``; manifests keep what was found."""
    from deployfa.bundle import Bundle
    from deployfa.generation.timing import time_generation

    if spinning == "both":
        raise InputError("generation is timed with one setting of spinning; pass --spinning on or off")
    bundles = [Bundle.open(path) for path in paths]
    contenders = [_torch(bundles[0], model)] if torch else []
    contenders += [_contender(bundle, target) for bundle in bundles]
    with progress_bar() as progress:
        report = time_generation(
            contenders,
            shapes,
            new_tokens=new_tokens,
            threads=threads,
            spinning=spinning == "on",
            launches=launches,
            rounds=-(-samples // launches),
            seed=seed,
            vocabulary=min(_vocabulary(bundle) for bundle in bundles),
            progress=lambda what, share: progress("benching", round(100 * share), 100),
        )
    for bundle, contender in zip(bundles, contenders[-len(bundles) :], strict=True):
        found = {
            f"{each.batch}x{each.prompt_tokens} new {new_tokens}": {
                "ttft_ms": each.ttft_ms,
                "tokens_per_second": each.tokens_per_second,
                "token_ratio": None if each.token_ratio is None else each.token_ratio.estimate,
            }
            for each in report.results
            if each.contender == contender.label
        }
        cpu, used = report.machine.cpu, report.settings.threads
        recorded(bundle, bench={"against": contenders[0].label, "threads": used, "cpu": cpu, "generation": found})
    if json:
        print_json(report)
    else:
        from deployfa.generation.timing_report import render

        show(render(report))


def _torch(bundle: Bundle, model: str | None) -> GenerationContender:
    from deployfa.generation.timing import GenerationContender

    base = model or bundle.manifest.base.name
    if bundle.manifest.tables is not None:  # its adapters are not in it
        return GenerationContender(label="torch", kind="torch", model=base)
    return GenerationContender(label="torch", kind="torch", adapter=bundle.adapter, model=base)


def _contender(bundle: Bundle, target: str | None) -> GenerationContender:
    from deployfa.generation.timing import GenerationContender

    return GenerationContender(label=str(bundle.path), bundle=bundle.path, target=target or bundle.manifest.target)


def _vocabulary(bundle: Bundle) -> int:
    """How many tokens there are; few enough for any, where the graph does not say."""
    last = bundle.manifest.graph.outputs[0].shape[-1]
    return last if isinstance(last, int) else 256
