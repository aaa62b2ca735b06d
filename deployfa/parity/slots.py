"""A bundle with slots is held against two truths: its adapter's while that is active, and the base's while none is."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.bundle.engines import engine_of
from deployfa.bundle.open_engine import open_slots
from deployfa.bundle.slots import idle_row, row_adapter, slots_of
from deployfa.edits import Array
from deployfa.graph.idle import idle_branch
from deployfa.graph.storage import load_graph, save_graph
from deployfa.parity.cases import Case, narrowed, of_one_token, read_cases
from deployfa.parity.measures import LIMIT, failure, measure
from deployfa.parity.noise import Noise
from deployfa.parity.other import Other
from deployfa.parity.report import ParityReport
from deployfa.parity.truth import run_graph, torch_truth
from deployfa.runtimes.slots import SlotAdapter, SlotRunner
from deployfa.runtimes.targets import DEFAULT_TARGET, is_engine

__all__ = ["coarseness", "run_slots", "slot_outputs", "stages_on", "with_idle"]

IDLE = "no adapter, as deployed"


def run_slots(runner: SlotRunner, cases: Sequence[Case], adapter: SlotAdapter | None) -> list[Array]:
    """The first output for every case, with ``adapter`` or without any, as wide as the truth of the case.

    What is beyond it must be masked, or the answer is none: NaN.
    """
    names, output = [spec.name for spec in runner.inputs], runner.outputs[0].name
    found = [runner.run({name: case.feeds[name] for name in names}, adapter)[output] for case in cases]
    return [narrowed(of_one_token(answer), case) for answer, case in zip(found, cases, strict=True)]


def slot_outputs(
    bundle: Bundle, cases: Sequence[Case], target: str, engine: str | None = None, other: Other | None = None
) -> list[tuple[str, list[Array]]]:
    """What the adapter of ``bundle``, or the ``other`` one, answers: deployed as it is, a file added to the run by ONNX
    Runtime, and with optimisations off, fed as arrays."""
    found: list[tuple[str, list[Array]]] = []
    for name, optimize in stages_on(target):
        runner = open_slots(bundle, target=target, engine=engine, spinning=False, optimize=optimize)
        if other is not None and other.slot is not None:
            runner.swap(runner.load(other.slot))
        active = runner.current
        assert active is not None  # open_slots leaves one
        found.append((name, run_slots(runner, cases, active if optimize else runner.load(active.row))))
    return found


def stages_on(target: str) -> list[tuple[str, bool]]:
    """What a bundle is run as on ``target``, and whether the runtime may optimise it."""
    if is_engine(target):
        return [(f"{target} engine", True)]
    shown = "ONNX Runtime" if target == DEFAULT_TARGET else target
    return [(f"{shown}, optimisations off", False), (f"{shown}, as deployed", True)]


def with_idle(
    bundle: Bundle,
    report: ParityReport,
    cases: Sequence[Case],
    *,
    target: str,
    engine: str | None = None,
    model: str | Path | None = None,
) -> ParityReport:
    """``report`` with a stage for ``bundle`` without its adapter.

    With ``model`` the truth is PyTorch's for ``cases``, else the stored one.  Where there is an idle branch, its
    answers must be those of the branch alone, bit for bit; an engine has none, and computes with zeros.
    """
    slots = slots_of(bundle)
    if model is None:
        cases, noise = read_cases(bundle.path / slots.idle.file), Noise(slots.idle.noise, slots.idle.noise_max_abs, ())
    else:
        # the manifest's base is the one it was exported on, also where a mismatch was allowed
        own = dataclasses.replace(Adapter.load(bundle.adapter), base=bundle.manifest.base)
        cases, noise, _ = torch_truth(model, row_adapter(own, slots.layout, idle_row(bundle)), cases)
    found = run_slots(open_slots(bundle, target=target, engine=engine, spinning=False), cases, None)
    stage = measure(
        IDLE,
        found,
        [case.truth for case in cases if case.truth is not None],
        [case.base for case in cases if case.base is not None],
        noise=noise.relative * coarseness(bundle, target, engine),
        noise_max_abs=noise.max_abs * coarseness(bundle, target, engine),
    )
    reason = failure(stage)
    exact = slots.idle_branch and not is_engine(target)
    if reason is None and exact and not _same_bits(found, _alone(bundle, cases, target)):
        reason = f"{IDLE}: the answers are not those of the base graph in it, bit for bit"
    # without an adapter there is no effect to measure by
    stages = [msgspec.structs.replace(stage, effect_error=None, passed=reason is None), *report.stages]
    if reason is None or not report.passed:
        return msgspec.structs.replace(report, stages=stages)
    return msgspec.structs.replace(report, stages=stages, passed=False, reason=reason)


def coarseness(bundle: Bundle, target: str, engine: str | None) -> float:
    """How much coarser than float32 an answer may be: what an engine's graph was allowed when it was built."""
    if not is_engine(target):
        return 1.0
    return engine_of(bundle, target, engine).error_limit / (LIMIT * bundle.manifest.reference.noise)


def _alone(bundle: Bundle, cases: Sequence[Case], target: str) -> list[Array]:
    """What the idle branch answers as a graph of its own."""
    with tempfile.TemporaryDirectory(prefix="deployfa-idle-") as scratch:
        return run_graph(save_graph(idle_branch(load_graph(bundle.graph)), Path(scratch)), cases, target=target)


def _same_bits(one: Sequence[Array], other: Sequence[Array]) -> bool:
    return all(a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))
