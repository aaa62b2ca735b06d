"""Interleaved measuring: in every round each contender runs one short block, in an order drawn anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from deployfa.bench import protocol as say
from deployfa.bench.contender import Contender, Shape
from deployfa.bench.results import SpinningState
from deployfa.bench.worker_process import WorkerProcess

__all__ = ["Cold", "Key", "Measured", "Plan", "Progress", "count_flops", "measure"]

Samples = npt.NDArray[np.float64]
Progress = Callable[[str, float], None]
"""Called with what is going on and the share of the work done, 0 to 1."""

_LEAST_ROUNDS = 3
_WANTED_ROUNDS = 10  # a launch; a ratio rests on how many rounds there are, not on how many runs
_WARM_SHARE = 0.25  # of a shape's time, a contender and launch


@dataclass(frozen=True)
class Plan:
    """Everything that decides how the measuring goes."""

    contenders: tuple[Contender, ...]
    shapes: tuple[Shape, ...]
    spinning: tuple[SpinningState, ...]
    threads: int
    launches: int
    min_samples: int
    max_seconds_per_shape: float
    block_ms: float
    seed: int
    vocabulary: int


@dataclass(frozen=True)
class Key:
    """What a list of blocks belongs to."""

    contender: str
    shape: Shape
    spinning: SpinningState


@dataclass
class Cold:
    """Start-up figures of a contender, one a launch, in milliseconds, and its peak memory."""

    start_ms: list[float] = field(default_factory=list)
    import_ms: list[float] = field(default_factory=list)
    session_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


@dataclass
class Measured:
    """blocks: for each key, one array (rounds, runs) of milliseconds a launch."""

    blocks: dict[Key, list[Samples]] = field(default_factory=dict)
    cold: dict[str, Cold] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def measure(plan: Plan, progress: Progress) -> Measured:
    """Launch every contender ``plan.launches`` times per setting of spinning, and time all shapes in each launch."""
    measured = Measured(cold={contender.label: Cold() for contender in plan.contenders})
    generator = np.random.default_rng(plan.seed)
    steps = len(plan.spinning) * plan.launches * len(plan.shapes)
    done = 0
    for spinning in plan.spinning:
        for launch in range(plan.launches):
            with ExitStack() as stack:
                workers = _launch(plan, spinning, stack, measured.cold, generator)
                for shape in plan.shapes:
                    progress(f"{shape}, spinning {spinning}, launch {launch + 1} of {plan.launches}", done / steps)
                    _measure_shape(plan, workers, shape, spinning, measured, generator)
                    done += 1
                _remember_memory(workers, measured.cold)
    progress("done", 1.0)
    return measured


def count_flops(plan: Plan) -> dict[tuple[str, Shape], say.Counted]:
    """Operations of every contender at every shape, in workers of their own: a profile's memory is not the bench's."""
    found = {}
    specs: tuple[Any, ...] = ()
    for contender in _graphs_first(plan.contenders):
        with WorkerProcess(contender.label, threads=plan.threads, spinning=False) as worker:
            opened = worker.ask(_open(contender, plan.threads, False, specs), say.Opened)
            specs = specs or opened.inputs
            for shape in plan.shapes:
                worker.ask(_prepare(plan, shape), say.Prepared)
                found[contender.label, shape] = worker.ask(say.Count(), say.Counted)
    return found


def _launch(
    plan: Plan,
    spinning: SpinningState,
    stack: ExitStack,
    cold: Mapping[str, Cold],
    generator: np.random.Generator,
) -> dict[str, WorkerProcess]:
    """One process a contender.  Graphs open first, in an order drawn anew: modules need to know a graph's inputs."""
    workers: dict[str, WorkerProcess] = {}
    specs: tuple[Any, ...] = ()
    drawn = [plan.contenders[index] for index in generator.permutation(len(plan.contenders))]
    on = spinning == "on"
    # whichever graph opens first, the specs are those of the first one listed
    for contender in _graphs_first(drawn):
        worker = stack.enter_context(WorkerProcess(contender.label, threads=plan.threads, spinning=on))
        opened = worker.ask(_open(contender, plan.threads, on, specs), say.Opened)
        if contender == next((each for each in plan.contenders if each.kind == "onnx"), None):
            specs = opened.inputs
        workers[contender.label] = worker
        times = cold[contender.label]
        times.start_ms.append(worker.start_ms)
        times.import_ms.append(opened.import_ms)
        times.session_ms.append(opened.session_ms)
    return workers


def _measure_shape(
    plan: Plan,
    workers: Mapping[str, WorkerProcess],
    shape: Shape,
    spinning: SpinningState,
    measured: Measured,
    generator: np.random.Generator,
) -> None:
    budget_s = plan.max_seconds_per_shape / plan.launches
    labels = list(workers)
    medians = []
    for label in labels:
        first = workers[label].ask(_prepare(plan, shape), say.Prepared)
        if len(measured.cold[label].first_ms) < len(measured.cold[label].session_ms):
            measured.cold[label].first_ms.append(first.first_ms)
        warmed = workers[label].ask(say.Warm(1e3 * _WARM_SHARE * budget_s), say.Warmed)
        medians.append(warmed.median_ms)
        if not warmed.steady:
            measured.warnings.append(f"'{label}' at {shape} had not become steady after {warmed.runs} warm-up runs")
    # the same count for all, so that every contender's figures rest on equally many samples
    share = -(-plan.min_samples // plan.launches)
    most = max(2, share // _WANTED_ROUNDS)
    count = int(np.clip(round(plan.block_ms * len(medians) / sum(medians)), 2, most))
    needed = max(_LEAST_ROUNDS, -(-share // count))
    rounds: dict[str, list[list[float]]] = {label: [] for label in labels}
    deadline = time.perf_counter() + budget_s
    for index in range(needed):
        if index >= _LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        for drawn in generator.permutation(len(labels)):
            label = labels[drawn]
            rounds[label].append(workers[label].ask(say.Run(count), say.Block).ms)
    for label in labels:
        blocks = measured.blocks.setdefault(Key(label, shape, spinning), [])
        blocks.append(np.array(rounds[label], dtype=np.float64))


def _remember_memory(workers: Mapping[str, WorkerProcess], cold: Mapping[str, Cold]) -> None:
    for label, worker in workers.items():
        peak = worker.ask(say.Memory(), say.Memorised).peak_bytes
        if peak is not None:
            cold[label].peak_bytes = max(peak, cold[label].peak_bytes or 0)


def _graphs_first(contenders: Sequence[Contender]) -> list[Contender]:
    return sorted(contenders, key=lambda contender: contender.kind != "onnx")


def _open(contender: Contender, threads: int, spinning: bool, specs: tuple[Any, ...]) -> say.Open:
    return say.Open(
        label=contender.label,
        kind=contender.kind,
        graph=None if contender.graph is None else str(contender.graph),
        adapter=None if contender.adapter is None else str(contender.adapter),
        model=contender.model,
        target=contender.target,
        threads=threads,
        spinning=spinning,
        inputs=specs if contender.kind == "torch" else (),
        adapters=contender.adapters,
        fleet=None if contender.fleet is None else str(contender.fleet),
        bundle=None if contender.bundle is None else str(contender.bundle),
        engine=contender.engine,
    )


def _prepare(plan: Plan, shape: Shape) -> say.Prepare:
    return say.Prepare(shape.batch, shape.sequence, plan.seed, plan.vocabulary)
