"""A bundle whose adapter can be swapped at every call, and other adapters for it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.atomic import check_output
from deployfa.base_graphs import base_graph
from deployfa.bench import Shape
from deployfa.bundle import Bundle
from deployfa.bundle.manifest import MANIFEST, Optimization, Slots
from deployfa.bundle.slots import idle_row, known_labels, load_file, row_adapter, slots_of
from deployfa.data import Row
from deployfa.edits import Array
from deployfa.errors import RuntimeTargetError
from deployfa.fusion import choose_fusion
from deployfa.graph import make_plan
from deployfa.graph.idle import with_idle_branch, with_row
from deployfa.graph.optimize import fuse
from deployfa.graph.row_labels import add_labels_input
from deployfa.graph.row_layout import answer_width, base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_slots
from deployfa.graph.storage import save_graph
from deployfa.kept_fusions import compare_fusions, describe_losses
from deployfa.parity.cases import Case, widened, write_cases
from deployfa.parity.measures import LIMIT, normwise, unmasked
from deployfa.parity.noise import Noise
from deployfa.parity.other import Other
from deployfa.parity.slots import run_slots
from deployfa.parity.truth import graph_truth, run_graph
from deployfa.pipeline import (
    DEFAULT_SHAPES,
    Content,
    Exported,
    check_effect,
    check_export_options,
    reference,
    stored_reference,
    write_bundle,
)
from deployfa.runtimes.onnx_adapter import SUFFIX, read_labelled, write_onnx_adapter
from deployfa.runtimes.slots import SlotAdapter, SlotRunner
from deployfa.tables import base_row, row_of
from deployfa.tables.layout import LABELS
from deployfa.tables.words import SLOTS

__all__ = ["export_slots", "other_in_slots", "slot_adapter", "slot_row", "write_slot"]

ADAPTER, IDLE = f"adapter{SUFFIX}", "idle.safetensors"


@dataclass(frozen=True, eq=False)
class _Truth:
    """Cases with their truth, and the noise that an answer may have."""

    cases: list[Case]
    noise: Noise

    def error(self, found: Sequence[Array]) -> float:
        """Normwise relative."""
        truth = np.concatenate([case.truth for case in self.cases if case.truth is not None])
        return normwise(*unmasked(np.concatenate(list(found)), truth))


@dataclass(frozen=True, eq=False)
class _Fused:
    """The base graph and the slot graph, each as its fusion left it, and the one graph that is made of them."""

    base: ir.Model
    slots: ir.Model
    whole: ir.Model
    idle: Optimization
    active: Optimization


def export_slots(
    adapter: Adapter,
    out: Path,
    *,
    model: str | Path | None = None,
    target: str = "onnxruntime-cpu",
    optimize: str = "auto",
    idle_branch: bool = True,
    max_rank: int = 0,
    max_labels: int = 0,
    shapes: Sequence[Shape] = DEFAULT_SHAPES,
    rows: Sequence[Row] | None = None,
    threads: int | None = None,
    force: bool = False,
    allow_base_mismatch: bool = False,
    status: Callable[[str], None] | None = None,
) -> Exported:
    """Write a bundle that is the base until a run adds an adapter: ``adapter``, which comes with it, or any other that
    fits its slots.  Whole or not at all.

    The slots are those that ``adapter`` needs; ``max_rank`` and ``max_labels`` leave room for others.  ``idle_branch``:
    keep the base graph beside the slot graph, so that idle costs nothing, for twice the memory.  The fusion of each is
    chosen by itself.  Idle answers are held against the base graph bit for bit, those of the adapter against the
    float64 reference.  Raises what ``deployfa.pipeline.export`` raises, and ``PlanError`` for an edit that no input can
    hold.
    """
    say = status or (lambda _: None)
    optimize = check_export_options(target, optimize)
    check_output(out, force=force, holding=MANIFEST)
    base = base_graph(adapter, model=model, allow_mismatch=allow_base_mismatch, status=status)
    graph = base.load()
    layout = make_layout(graph, {adapter.method: adapter}, max_rank=max_rank, max_labels=max_labels, mixed=False)
    # where a mismatch was allowed, adapters of the base that it really is fit too
    layout = msgspec.structs.replace(layout, fingerprints=sorted({*layout.fingerprints, base.fingerprint}))
    zero = base_row(layout, base_heads(graph, layout))
    # base_graph has checked the base
    row = row_of(adapter, layout, zero, weights=base_weights(graph, layout), allow_mismatch=True, words=SLOTS)
    slots = add_slots(graph, layout)
    say("computing the reference in float64")
    cases, noise = reference(base, graph, adapter, rows)
    check_effect(adapter, cases, noise)
    truth = _Truth([widened(case, answer_width(graph, layout)) for case in cases], noise)
    idle_truth = _Truth(*graph_truth(graph, row_adapter(adapter, layout, zero), cases))
    with tempfile.TemporaryDirectory(prefix="deployfa-slots-") as folder:
        scratch = Path(folder)
        choose = partial(choose_fusion, shapes=shapes, threads=threads, status=say)
        say("fusing the slots")
        active, fused_slots = choose(
            slots, optimize, truth.cases, noise, scratch=_made(scratch / "active"), finish=partial(with_row, row=row)
        )
        if idle_branch:
            say("fusing the base")
            idle, fused_base = choose(
                graph, optimize, idle_truth.cases, idle_truth.noise, scratch=_made(scratch / "idle")
            )
            whole = with_row(with_idle_branch(fused_base, fused_slots), zero)
        else:
            idle, fused_base, whole = active, fuse(graph, active.chosen), with_row(fused_slots, zero)
        add_labels_input(whole)
        fused = _Fused(fused_base, fused_slots, whole, idle, active)
        say("holding the bundle against the base graph and the reference")
        labels = adapter.labels or (() if adapter.modules else base.labels)
        write_own = partial(write_onnx_adapter, row=row, layout=layout, idle_branch=idle_branch, labels=labels)
        write_own(scratch / ADAPTER)
        save_graph(whole, _made(scratch / "whole"), share_equal=True)
        runner = SlotRunner(scratch / "whole" / "model.onnx", layout, threads=threads, spinning=False)
        exact = _check(runner, fused, scratch, truth, idle_truth, threads=threads)
        say("counting what the runtime fuses")
        fusions = compare_fusions(graph, slots, active.chosen, fused=fused.slots)
        say(f"writing '{out}'")

        def write(folder: Path) -> None:
            adapter.save(folder / "adapter.safetensors")
            write_own(folder / ADAPTER)
            write_cases(folder / IDLE, idle_truth.cases)

        content = Content(
            adapter,
            base,
            make_plan(graph, adapter, placement="side-op"),
            whole,
            idle,
            fusions,
            target,
            cases,
            noise,
            write=write,
            slots=Slots(
                layout=layout,
                file=ADAPTER,
                idle_branch=idle_branch,
                labels=list(base.labels),
                active=active,
                idle=stored_reference(IDLE, idle_truth.cases, idle_truth.noise),
                exact=exact,
            ),
        )
        bundle = write_bundle(out, content, force=force)
    lost = describe_losses(fusions)
    when = "while an adapter is active" if idle_branch else "active or not"
    warnings = (*base.warnings, f"{when}, the slots cost fusions of the runtime: {lost}") if lost else base.warnings
    return Exported(bundle, content.plan, base.made_now, warnings)


def slot_row(
    bundle: Bundle,
    adapter: Adapter,
    *,
    model: str | Path | None = None,
    allow_base_mismatch: bool = False,
    status: Callable[[str], None] | None = None,
) -> dict[str, Array]:
    """``adapter`` as the row that the slots of ``bundle`` take.

    A LoRFA for slots on a layer's output needs the base's weights, from the base graph: that of the bundle, or of
    ``model``.  Raises ``BaseMismatchError``, ``SiteError`` or ``EditError``, each with what to type instead, if the
    adapter does not fit.
    """
    layout = slots_of(bundle).layout
    weights = None
    needed = {site for low in layout.low_ranks if low.where == "output" for site in low.sites}
    if any(edit.input_low_rank is not None for site, edit in adapter.edits.items() if site in needed):
        own = dataclasses.replace(Adapter.load(bundle.adapter), base=bundle.manifest.base)
        weights = base_weights(base_graph(own, model=model, status=status).load(), layout)
    return row_of(adapter, layout, idle_row(bundle), weights=weights, allow_mismatch=allow_base_mismatch, words=SLOTS)


def write_slot(
    bundle: Bundle,
    adapter: Adapter,
    out: Path,
    *,
    model: str | Path | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    status: Callable[[str], None] | None = None,
) -> None:
    """Write ``adapter`` as an ``.onnx_adapter`` for the slots of ``bundle``; raises what ``slot_row`` raises."""
    slots = slots_of(bundle)
    row = slot_row(bundle, adapter, model=model, allow_base_mismatch=allow_base_mismatch, status=status)
    # a graph of an older deployfa takes no names, and the runtime no file with them
    named = any(tensor.name == LABELS for tensor in bundle.manifest.graph.inputs)
    labels = _labels(bundle, adapter) if named else ()
    write_onnx_adapter(out, row, slots.layout, idle_branch=slots.idle_branch, labels=labels, force=force)


def slot_adapter(
    bundle: Bundle,
    runner: SlotRunner,
    path: Path,
    *,
    model: str | Path | None = None,
    allow_base_mismatch: bool = False,
) -> SlotAdapter:
    """The adapter in ``path``, an ``.onnx_adapter`` or any adapter file, ready for ``runner`` of ``bundle``."""
    if path.suffix == SUFFIX:
        return load_file(bundle, runner, path)
    adapter = Adapter.load(path)
    row = slot_row(bundle, adapter, model=model, allow_base_mismatch=allow_base_mismatch)
    return runner.load(row, labels=_labels(bundle, adapter))


def other_in_slots(
    bundle: Bundle,
    path: Path,
    *,
    model: str | Path | None = None,
    allow_base_mismatch: bool = False,
    status: Callable[[str], None] | None = None,
) -> Other:
    """The adapter in ``path``, an ``.onnx_adapter`` or any adapter file, to be verified in the slots of ``bundle``.

    Of an ``.onnx_adapter`` the truth is that of the numbers in it, of any other file that of the adapter as it was
    trained.  Raises what ``read_labelled`` and ``slot_row`` raise.
    """
    slots, own = slots_of(bundle), Adapter.load(bundle.adapter)
    if path.suffix == SUFFIX:
        row, labels = read_labelled(path, slots.layout, idle_branch=slots.idle_branch)
        labels = labels or known_labels(bundle, row)
        return Other(str(path), row_adapter(own, slots.layout, row), labels, bundle.manifest.base, path)
    adapter = Adapter.load(path)
    row = slot_row(bundle, adapter, model=model, allow_base_mismatch=allow_base_mismatch, status=status)
    # where it brings no head it answers with the base's
    modules = {**row_adapter(own, slots.layout, idle_row(bundle)).modules, **adapter.modules}
    whole = dataclasses.replace(adapter, modules=modules)
    return Other(str(path), whole, _labels(bundle, adapter), bundle.manifest.base, row)


def _labels(bundle: Bundle, adapter: Adapter) -> tuple[str, ...]:
    return tuple(adapter.labels or (() if adapter.modules else slots_of(bundle).labels))


def _check(
    runner: SlotRunner, fused: _Fused, scratch: Path, truth: _Truth, idle_truth: _Truth, *, threads: int | None
) -> bool:
    """Whether idle answers are the base graph's, bit for bit; they must be where there is an idle branch.

    Raises ``RuntimeTargetError`` if they are not, and if the adapter's own, or idle ones, are beyond the noise.
    """
    idle = run_slots(runner, idle_truth.cases, None)
    alone = run_graph(save_graph(fused.base, _made(scratch / "base")), idle_truth.cases, threads=threads)
    exact = all(np.array_equal(one, other) for one, other in zip(idle, alone, strict=True))
    if runner.idle_branch and not exact:
        raise RuntimeTargetError(
            "without an adapter the slots do not answer bit for bit as the base graph does; use --optimize none"
        )
    active = run_slots(runner, truth.cases, runner.load(scratch / ADAPTER))
    for found, wanted, whose in (
        (active, truth, "with the adapter"),
        (idle, idle_truth, "without an adapter"),
    ):
        error = wanted.error(found)
        if not error <= LIMIT * wanted.noise.relative:
            raise RuntimeTargetError(
                f"{whose} the slots differ from the reference by {error / wanted.noise.relative:.1f}x the float32 "
                "noise; use --optimize none"
            )
    return exact


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
