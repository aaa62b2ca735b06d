"""Turn what a person names on the command line into bench contenders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deployfa.bench import BenchReport, Contender
from deployfa.bundle import Bundle
from deployfa.errors import InputError
from deployfa.pipeline import fused_base
from deployfa.runtimes.targets import check_target

__all__ = ["collect", "forget_scratch", "summaries"]


def collect(
    paths: Sequence[Path],
    against: Sequence[str],
    scratch: Path,
    *,
    model: str | None = None,
    target: str | None = None,
    engine: str | None = None,
) -> tuple[list[Bundle], list[Contender]]:
    """What to time: first what ``against`` names (``base``, ``torch``, or a graph file), then the bundles.

    ``base`` is the first bundle's base graph with the same head and fusion, written to ``scratch``.  target: of all
    graphs; by default a bundle's own, and the first bundle's for the others.  engine: of each bundle, for a target that
    runs one.
    """
    if target is not None:
        check_target(target)
    bundles = [Bundle.open(path) for path in paths]
    first = bundles[0]
    beside = target or first.manifest.target
    contenders = []
    for name in against:
        if name == "base":
            contenders.append(Contender(label="base", graph=fused_base(first, scratch, model=model), target=beside))
        elif name == "torch":
            base = model or first.manifest.base.name
            contenders.append(Contender(label="torch", kind="torch", adapter=first.adapter, model=base))
        elif name.endswith(".onnx"):
            contenders.append(Contender(label=Path(name).stem, graph=Path(name), target=beside))
        else:
            raise InputError(f"--against knows base, torch and FILE.onnx, not '{name}'")
    for bundle in bundles:
        contenders.append(_contender(bundle, _label(bundle, bundles), target or bundle.manifest.target, engine))
    return bundles, contenders


def _contender(bundle: Bundle, label: str, target: str, engine: str | None) -> Contender:
    tables = bundle.manifest.tables
    if tables is None:
        return Contender(label=label, graph=bundle.graph, bundle=bundle.path, target=target, engine=engine)
    fleet = bundle.path / tables.file if tables.file is not None else None
    return Contender(
        label=label,
        graph=bundle.graph,
        bundle=bundle.path,
        target=target,
        adapters=len(tables.adapters) - 1,
        fleet=fleet,
        engine=engine,
    )


def forget_scratch(report: BenchReport, scratch: Path) -> BenchReport:
    """The report without paths of graphs that were made for the bench only and are gone after it."""
    kept = [
        msgspec.structs.replace(each, graph=None) if each.graph and Path(each.graph).is_relative_to(scratch) else each
        for each in report.contenders
    ]
    return msgspec.structs.replace(report, contenders=kept)


def summaries(bundles: Sequence[Bundle], report: BenchReport) -> Iterator[tuple[Bundle, dict[str, Any]]]:
    """For each bundle, what its manifest keeps of the bench: medians and ratios per shape, and on what machine."""
    targets = {each.label: each.target for each in report.contenders}
    for bundle in bundles:
        label = _label(bundle, bundles)
        shapes = {
            f"{r.batch}x{r.sequence} spinning {r.spinning}": {
                "p50_ms": r.p50_ms,
                "ratio": r.ratio,
                "ratio_low": r.ratio_low,
                "ratio_high": r.ratio_high,
            }
            for r in report.results
            if r.contender == label
        }
        cpu = getattr(report.machine, "cpu", "")
        yield (
            bundle,
            {
                "against": report.contenders[0].label,
                "target": targets[label],
                "threads": report.settings.threads,
                "cpu": cpu,
                "shapes": shapes,
            },
        )


def _label(bundle: Bundle, bundles: Sequence[Bundle]) -> str:
    """The directory's name; the whole path when two bundles share it."""
    name = bundle.path.name or str(bundle.path)
    same = [other for other in bundles if (other.path.name or str(other.path)) == name]
    return name if len(same) == 1 else str(bundle.path)
