"""``time_generation``: time to the first token and tokens a second, against PyTorch's ``generate``.

As in ``deployfa.bench``: a process a contender and launch, in every round each generates once, in an order drawn anew,
and what is compared are the times of one round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from deployfa.bench import Shape
from deployfa.bench import protocol as say
from deployfa.bench.machine import available_cores, describe_machine
from deployfa.bench.statistics import median_ratio, verdict
from deployfa.bench.worker_process import WorkerProcess
from deployfa.errors import InputError, StatisticsError
from deployfa.generation.timing_report import Generating, GenerationBench, GenerationResult, GenerationSettings, Ratio

__all__ = ["GenerationContender", "time_generation"]

Progress = Callable[[str, float], None]
Samples = npt.NDArray[np.float64]

_WORKER = "deployfa.generation.timing_worker"
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class GenerationContender:
    """A bundle; or of kind ``torch`` a causal language model, ``model``, with ``adapter`` unfolded on it if there is
    one."""

    label: str
    kind: Literal["bundle", "torch"] = "bundle"
    bundle: Path | None = None
    adapter: Path | None = None
    model: str | None = None
    target: str | None = None


@dataclass
class _Found:
    """first, step: for each shape, one list of rounds a launch, in milliseconds; tokens: their sha256."""

    start_ms: list[float] = field(default_factory=list)
    import_ms: list[float] = field(default_factory=list)
    session_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first: dict[Shape, list[list[float]]] = field(default_factory=dict)
    step: dict[Shape, list[list[float]]] = field(default_factory=dict)
    tokens: dict[Shape, set[str]] = field(default_factory=dict)


def time_generation(
    contenders: Sequence[GenerationContender],
    shapes: Sequence[Shape],
    *,
    new_tokens: int = 64,
    threads: int | None = None,
    spinning: bool = False,
    launches: int = 3,
    rounds: int = 5,
    seed: int = 0,
    vocabulary: int = 1000,
    progress: Progress | None = None,
) -> GenerationBench:
    """Generate greedily at every shape, ``batch`` prompts of ``sequence`` tokens, drawn, the same for all contenders.

    threads: of every contender, by default all cores.  Raises ``InputError`` on wrong arguments, ``RuntimeTargetError``
    when a contender does not run.  No worker outlives the call.
    """
    _check(contenders, shapes, new_tokens, launches, rounds)
    settings = GenerationSettings(
        threads=threads if threads is not None else available_cores(),
        spinning=spinning,
        launches=launches,
        rounds=rounds,
        new_tokens=new_tokens,
        seed=seed,
        vocabulary=vocabulary,
    )
    say_progress = progress or (lambda _doing, _share: None)
    machine = describe_machine()
    found = {each.label: _Found() for each in contenders}
    generator = np.random.default_rng(seed)
    for launch in range(launches):
        with ExitStack() as stack:
            workers = _launch(contenders, settings, stack, found, generator)
            for number, shape in enumerate(shapes):
                share = (launch + number / len(shapes)) / launches
                say_progress(f"{shape}, launch {launch + 1} of {launches}", share)
                _measure(workers, shape, settings, found, generator)
            for label, worker in workers.items():
                peak = worker.ask(say.Memory(), say.Memorised).peak_bytes
                found[label].peak_bytes = max(peak or 0, found[label].peak_bytes or 0) or None
    say_progress("done", 1.0)
    first = contenders[0].label
    warnings = []
    if machine.busy:
        warnings.append(
            f"other programs used {100 * (machine.busy_share or 0):.0f} % of the processors before the bench; the "
            "figures are partly theirs, bench again on a quiet machine"
        )
    return GenerationBench(
        machine=machine,
        settings=settings,
        contenders=[_contender(each, found[each.label]) for each in contenders],
        results=[
            _result(each.label, shape, found[each.label], found[first], each.label == first, settings)
            for shape in shapes
            for each in contenders
        ],
        warnings=warnings,
    )


def _launch(
    contenders: Sequence[GenerationContender],
    settings: GenerationSettings,
    stack: ExitStack,
    found: dict[str, _Found],
    generator: np.random.Generator,
) -> dict[str, WorkerProcess]:
    """One process a contender, in an order drawn anew."""
    workers = {}
    for index in generator.permutation(len(contenders)):
        each = contenders[index]
        worker = stack.enter_context(
            WorkerProcess(
                each.label,
                threads=settings.threads,
                spinning=settings.spinning,
                timeout_s=_TIMEOUT_S,
                module=_WORKER,
            )
        )
        request = say.OpenGenerator(
            label=each.label,
            kind=each.kind,
            bundle=None if each.bundle is None else str(each.bundle),
            adapter=None if each.adapter is None else str(each.adapter),
            model=each.model,
            target=each.target,
            threads=settings.threads,
            spinning=settings.spinning,
        )
        opened = worker.ask(request, say.Opened)
        times = found[each.label]
        times.start_ms.append(worker.start_ms)
        times.import_ms.append(opened.import_ms)
        times.session_ms.append(opened.session_ms)
        workers[each.label] = worker
    return workers


def _measure(
    workers: dict[str, WorkerProcess],
    shape: Shape,
    settings: GenerationSettings,
    found: dict[str, _Found],
    generator: np.random.Generator,
) -> None:
    labels = list(workers)
    prepare = say.PreparePrompts(shape.batch, shape.sequence, settings.new_tokens, settings.seed, settings.vocabulary)
    for label in labels:  # the first time of a shape is a warm-up
        workers[label].ask(prepare, say.Generated)
        found[label].first.setdefault(shape, []).append([])
        found[label].step.setdefault(shape, []).append([])
    for _ in range(settings.rounds):
        for index in generator.permutation(len(labels)):
            mine = found[labels[index]]
            reply = workers[labels[index]].ask(say.Generate(), say.Generated)
            mine.first[shape][-1].append(reply.first_ms)
            mine.step[shape][-1].append((reply.ms - reply.first_ms) / (settings.new_tokens - 1))
            mine.tokens.setdefault(shape, set()).add(reply.sha256)


def _result(
    label: str, shape: Shape, mine: _Found, reference: _Found, is_reference: bool, settings: GenerationSettings
) -> GenerationResult:
    ratios: dict[str, Ratio | None] = {"first": None, "step": None}
    refused = None
    if not is_reference:
        for kind in ratios:
            try:
                ratios[kind] = _ratio(getattr(mine, kind)[shape], getattr(reference, kind)[shape], settings.seed)
            except StatisticsError as error:
                refused = str(error)
    step = float(np.median(mine.step[shape]))
    return GenerationResult(
        contender=label,
        batch=shape.batch,
        prompt_tokens=shape.sequence,
        samples=sum(map(len, mine.first[shape])),
        ttft_ms=float(np.median(mine.first[shape])),
        token_ms=step,
        tokens_per_second=1e3 * shape.batch / step,
        ttft_ratio=ratios["first"],
        token_ratio=ratios["step"],
        same_tokens=mine.tokens[shape] == reference.tokens[shape],
        refused=refused,
    )


def _ratio(mine: list[list[float]], reference: list[list[float]], seed: int) -> Ratio:
    """A block of one run a round."""
    blocks: list[list[Samples]] = [[np.array(launch)[:, None] for launch in each] for each in (mine, reference)]
    found = median_ratio(*blocks, seed=seed)
    # one launch cannot tell a contender from its place in memory
    said = verdict(found) if len(mine) > 1 else None
    return Ratio(estimate=found.estimate, low=found.low, high=found.high, verdict=said)


def _contender(contender: GenerationContender, found: _Found) -> Generating:
    return Generating(
        label=contender.label,
        kind=contender.kind,
        target="torch-cpu" if contender.kind == "torch" else contender.target or "onnxruntime-cpu",
        bundle=None if contender.bundle is None else str(contender.bundle),
        peak_memory_bytes=found.peak_bytes,
        start_ms=found.start_ms,
        import_ms=found.import_ms,
        session_ms=found.session_ms,
    )


def _check(
    contenders: Sequence[GenerationContender], shapes: Sequence[Shape], new_tokens: int, launches: int, rounds: int
) -> None:
    labels = [each.label for each in contenders]
    if not labels or len(set(labels)) != len(labels):
        raise InputError("nothing to time, or two contenders of one name; give each its own label")
    if not shapes:
        raise InputError("no shape to time; pass at least one, such as 4x32")
    if new_tokens < 2:
        raise InputError(f"{new_tokens} new tokens have no time between them; pass 2 or more")
    for name, value in (("launches", launches), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name} is {value}; pass 1 or more")
