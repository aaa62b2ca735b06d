"""``bench``: an honest latency comparison of contenders."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from deployfa.atomic import check_output, write_file
from deployfa.bench import ceiling
from deployfa.bench import protocol as say
from deployfa.bench.contender import Contender, Shape, check_contenders
from deployfa.bench.machine import available_cores, describe_machine
from deployfa.bench.measure import Cold, Key, Measured, Plan, Progress, Samples, count_flops, measure
from deployfa.bench.results import BenchReport, Ceiling, ContenderReport, Result, Settings, SpinningState
from deployfa.bench.sizes import contender_bytes
from deployfa.bench.statistics import Interval, Verdict, median_ratio, percentile, verdict
from deployfa.errors import InputError, StatisticsError
from deployfa.runtimes.targets import DEFAULT_TARGET

__all__ = ["bench"]

_PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99}
_SPINNING: Mapping[str, tuple[SpinningState, ...]] = {"on": ("on",), "off": ("off",), "both": ("off", "on")}


def bench(
    contenders: Sequence[Contender],
    shapes: Sequence[Shape],
    *,
    threads: int | None = None,
    spinning: Literal["on", "off", "both"] = "off",
    launches: int = 3,
    min_samples: int = 130,
    max_seconds_per_shape: float = 60.0,
    block_ms: float = 40.0,
    seed: int = 0,
    vocabulary: int = 1000,
    flops: bool = True,
    bare_matmul: bool = True,
    progress: Progress | None = None,
    samples_out: Path | None = None,
    force: bool = False,
) -> BenchReport:
    """Time ``contenders`` against the first of them at every shape.

    Each runs in a process of its own, launched ``launches`` times (from one launch no verdict follows).  Within a
    launch they alternate in rounds of blocks of about ``block_ms`` each, in random order, one at a time, until
    ``min_samples`` each or ``max_seconds_per_shape`` (for all contenders and launches together, warm-up apart, at
    least 3 rounds a launch).  threads: of every contender, ``None`` for all cores this process may use.  min_samples:
    130 supports p95, 662 p99.  flops and bare_matmul: whether to count operations and to time the ceiling beside them.
    samples_out: a JSON file for the raw samples.

    Raises ``InputError`` on wrong arguments, ``OutputExistsError`` before measuring, and ``RuntimeTargetError`` when a
    contender does not run.  No worker outlives the call.
    """
    listed = list(contenders)
    check_contenders(listed)
    _check_arguments(shapes, spinning, threads, launches, min_samples, max_seconds_per_shape, block_ms)
    if any(contender.label == ceiling.LABEL for contender in listed):
        raise InputError(f"the label '{ceiling.LABEL}' is taken by the ceiling; name the contender otherwise")
    if samples_out is not None:
        check_output(samples_out, force=force)
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="deployfa-bench-") as folder:
        target = next((each.target for each in listed if each.kind == "onnx"), DEFAULT_TARGET)
        beside = [ceiling.ceiling_contender(Path(folder), target)] if bare_matmul else []
        plan = Plan(
            contenders=(*listed, *beside),
            shapes=tuple(dict.fromkeys(shapes)),
            spinning=_SPINNING[spinning],
            threads=threads if threads is not None else available_cores(),
            launches=launches,
            min_samples=min_samples,
            max_seconds_per_shape=max_seconds_per_shape,
            block_ms=block_ms,
            seed=seed,
            vocabulary=vocabulary,
        )
        counted = count_flops(replace(plan, contenders=tuple(listed))) if flops else {}
        measured = measure(plan, progress or (lambda _doing, _share: None))
    if samples_out is not None:
        _write_samples(samples_out, measured, force=force)
    keys = [Key(each.label, shape, on) for on in plan.spinning for shape in plan.shapes for each in listed]
    results = [_result(key, listed[0].label, measured, counted, seed) for key in keys]
    report = BenchReport(
        machine=machine,
        settings=Settings(
            threads=plan.threads,
            spinning=list(plan.spinning),
            launches=launches,
            min_samples=min_samples,
            max_seconds_per_shape=max_seconds_per_shape,
            block_ms=block_ms,
            seed=seed,
            vocabulary=vocabulary,
        ),
        contenders=[_contender(each, measured.cold[each.label]) for each in listed],
        results=results,
        ceilings=[_ceiling(Key(ceiling.LABEL, s, on), measured) for on in plan.spinning for s in plan.shapes if beside],
        warnings=[],
    )
    return msgspec.structs.replace(report, warnings=[*_warnings(report), *measured.warnings])


def _result(
    key: Key, reference: str, measured: Measured, counted: Mapping[tuple[str, Shape], say.Counted], seed: int
) -> Result:
    blocks = measured.blocks[key]
    samples = np.concatenate([block.ravel() for block in blocks])
    refused: dict[str, str] = {}
    found = {name: _percentile(samples, q, name, refused) for name, q in _PERCENTILES.items()}
    ratio = None
    if key.contender != reference:
        try:
            ratio = median_ratio(blocks, measured.blocks[Key(reference, key.shape, key.spinning)], seed=seed)
        except StatisticsError as error:
            refused["ratio"] = str(error)
    if ratio is not None and len(blocks) == 1:
        refused["verdict"] = "one launch cannot tell a contender from its place in memory; pass 2 or more launches"
    count = counted.get((key.contender, key.shape))
    if count is not None and count.flops is None:
        refused["flops"] = count.reason or "unknown"
    flops, p50_ms = count.flops if count is not None else None, found["p50_ms"]
    mean_ms = float(samples.mean())
    return Result(
        contender=key.contender,
        batch=key.shape.batch,
        sequence=key.shape.sequence,
        spinning=key.spinning,
        samples=samples.size,
        rounds=sum(len(block) for block in blocks),
        p50_ms=p50_ms,
        p90_ms=found["p90_ms"],
        p95_ms=found["p95_ms"],
        p99_ms=found["p99_ms"],
        mean_ms=mean_ms,
        min_ms=float(samples.min()),
        items_per_s=1e3 * key.shape.batch / mean_ms,
        ratio=ratio.estimate if ratio is not None else (1.0 if key.contender == reference else None),
        ratio_low=None if ratio is None else ratio.low,
        ratio_high=None if ratio is None else ratio.high,
        verdict=_verdict(key.contender == reference, ratio, refused),
        flops=flops,
        gflop_per_s=None if flops is None or p50_ms is None else flops / p50_ms / 1e6,
        refused=refused,
    )


def _verdict(is_reference: bool, ratio: Interval | None, refused: Mapping[str, str]) -> Verdict | None:
    if is_reference:
        return "reference"
    return None if ratio is None or "verdict" in refused else verdict(ratio)


def _percentile(samples: Samples, q: float, name: str, refused: dict[str, str]) -> float | None:
    try:
        return percentile(samples, q)
    except StatisticsError as error:
        refused[name] = str(error)
        return None


def _ceiling(key: Key, measured: Measured) -> Ceiling:
    samples = np.concatenate([block.ravel() for block in measured.blocks[key]])
    p50_ms = _percentile(samples, 0.5, "p50_ms", {})
    return Ceiling(
        batch=key.shape.batch,
        sequence=key.shape.sequence,
        spinning=key.spinning,
        m=key.shape.batch * key.shape.sequence,
        k=ceiling.IN_FEATURES,
        n=ceiling.OUT_FEATURES,
        samples=samples.size,
        p50_ms=p50_ms,
        gflop_per_s=None if p50_ms is None else ceiling.ceiling_flops(key.shape) / p50_ms / 1e6,
    )


def _contender(contender: Contender, cold: Cold) -> ContenderReport:
    return ContenderReport(
        label=contender.label,
        kind=contender.kind,
        target=contender.target if contender.kind == "onnx" else "torch-cpu",
        graph=None if contender.graph is None else str(contender.graph),
        bundle=None if contender.bundle is None else str(contender.bundle),
        size_bytes=contender_bytes(contender),
        peak_memory_bytes=cold.peak_bytes,
        start_ms=cold.start_ms,
        import_ms=cold.import_ms,
        session_ms=cold.session_ms,
        first_inference_ms=cold.first_ms,
    )


def _warnings(report: BenchReport) -> list[str]:
    found = []
    machine, settings = report.machine, report.settings
    if machine.busy:
        found.append(
            f"other programs used {100 * (machine.busy_share or 0):.0f} % of the processors before the bench; the "
            "figures are partly theirs, bench again on a quiet machine"
        )
    if settings.threads > machine.cores:
        found.append(f"{settings.threads} threads share {machine.cores} cores; pass {machine.cores} threads or fewer")
    short = [result for result in report.results if result.samples < settings.min_samples]
    if short:
        fewest = min(result.samples for result in short)
        found.append(
            f"time ran out with {fewest} of {settings.min_samples} samples; allow more than "
            f"{settings.max_seconds_per_shape:g} s a shape"
        )
    return found


def _write_samples(path: Path, measured: Measured, *, force: bool) -> None:
    """Milliseconds as measured: one entry a contender, shape, setting and launch; one list a round."""
    entries = [
        {
            "contender": key.contender,
            "batch": key.shape.batch,
            "sequence": key.shape.sequence,
            "spinning": key.spinning,
            "launch": launch,
            "rounds_ms": block.tolist(),
        }
        for key, blocks in measured.blocks.items()
        for launch, block in enumerate(blocks)
    ]
    with write_file(path, force=force) as partial:
        partial.write_bytes(msgspec.json.encode({"format": "deployfa-bench-samples/1", "samples": entries}))


def _check_arguments(
    shapes: Sequence[Shape],
    spinning: str,
    threads: int | None,
    launches: int,
    min_samples: int,
    max_seconds_per_shape: float,
    block_ms: float,
) -> None:
    if not shapes:
        raise InputError("no shape to bench at; pass at least one, such as 8x128")
    if spinning not in _SPINNING:
        raise InputError(f"spinning is '{spinning}'; pass on, off or both")
    for name, value in (("threads", 1 if threads is None else threads), ("launches", launches)):
        if value < 1:
            raise InputError(f"{name} is {value}; pass 1 or more")
    for name, number in (
        ("min_samples", min_samples),
        ("max_seconds_per_shape", max_seconds_per_shape),
        ("block_ms", block_ms),
    ):
        if number <= 0:
            raise InputError(f"{name} is {number:g}; pass more than 0")
