"""A fleet's update: one bundle of the base, written once, and for every adapter a patch of the tensors it changes.

The fleet bundle answers as the base does.  Its graph is nonetheless the first adapter's, with the base's numbers in it:
where that adapter makes two tensors of one (exporters and fusions merge equal ones, such as the norms of a fresh
model), the fleet bundle has two.  So a patch needs nothing but other numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter, BaseReference
from deployfa.atomic import check_output
from deployfa.base_graphs import BaseGraph
from deployfa.bench import Shape
from deployfa.bundle import Bundle
from deployfa.bundle.bundle import versions
from deployfa.bundle.patch import Patch, PatchMeta, graph_files, write_patch
from deployfa.convert import with_strength
from deployfa.data import Row
from deployfa.edits import Array
from deployfa.errors import BaseMismatchError, InputError, LeftoverError, PlanError, RuntimeTargetError
from deployfa.fusion import choose_fusion
from deployfa.graph import Plan, apply_adapter, make_plan
from deployfa.graph.difference import StructureDiffers, changed_tensors, with_tensors
from deployfa.graph.optimize import fuse
from deployfa.graph.plan import OWN_WEIGHT, SIDE_OP, Prefer, Preference
from deployfa.graph.sites import find_sites
from deployfa.graph.storage import load_graph, save_graph
from deployfa.kept_fusions import compare_fusions
from deployfa.parity.cases import Case, read_cases
from deployfa.parity.measures import LIMIT, normwise
from deployfa.parity.noise import Noise
from deployfa.parity.truth import graph_truth, run_graph, without_edits
from deployfa.pipeline import (
    DEFAULT_SHAPES,
    Content,
    check_effect,
    check_export_options,
    headed,
    plan_adapter,
    reference,
    summary,
    write_bundle,
)

__all__ = ["Delta", "export_delta"]

_STORED = {"float64", "float32", "float16", "bfloat16"}


@dataclass(frozen=True, eq=False)
class Delta:
    """A written patch.  ``bundle`` is the fleet's with the patch in it; ``wrote_bundle``: it was not there before."""

    patch: Patch
    bundle: Bundle
    plan: Plan
    wrote_bundle: bool
    ran_torch: bool
    warnings: tuple[str, ...]

    @property
    def share(self) -> float:
        """The patch's tensors over the bytes of the graph that they would otherwise travel in."""
        return self.patch.tensor_bytes / self.bundle.manifest.graph.bytes


def export_delta(
    adapter: Adapter,
    fleet: Path,
    out: Path,
    *,
    model: str | Path | None = None,
    target: str = "onnxruntime-cpu",
    optimize: str = "auto",
    placement: Preference = "auto",
    prefer: Prefer = "smallest-patch",
    untie: bool = False,
    require_fold: bool = False,
    shapes: Sequence[Shape] = DEFAULT_SHAPES,
    rows: Sequence[Row] | None = None,
    threads: int | None = None,
    force: bool = False,
    allow_base_mismatch: bool = False,
    status: Callable[[str], None] | None = None,
) -> Delta:
    """Write to ``out`` the tensors that ``adapter`` changes in the bundle ``fleet``.

    That bundle is written first if it is not there: the base with the adapter's head and no edits.

    ``optimize``, ``shapes`` and ``rows`` matter when the bundle is written; a patch has the bundle's fusion and
    reference inputs.  ``force`` replaces the patch, never the bundle.  The patched session is held against the float64
    reference and, bit for bit, against the graph that a full export would run.  Raises ``PlanError`` if the adapter
    changes more than numbers, ``BaseMismatchError`` if the bundle is of another base, ``LeftoverError`` if nothing
    differs, and ``RuntimeTargetError`` if the patched session answers otherwise.
    """
    say = status or (lambda _: None)
    fresh_optimize = check_export_options(target, optimize)
    check_output(out, force=force)
    if out.is_dir():
        raise InputError(f"'{out}' is a folder and a patch is one file; pass another --out")
    there = Bundle.open(fleet) if fleet.exists() else None
    if there is not None and optimize not in {"auto", there.manifest.optimization.chosen}:
        raise InputError(
            f"'{fleet}' has the fusion '{there.manifest.optimization.chosen}', and its patches must have it too; "
            "leave --optimize out, or write another bundle"
        )
    plan, base = plan_adapter(
        adapter,
        model=model,
        placement=placement,
        prefer=prefer,
        untie=untie,
        require_fold=require_fold,
        allow_base_mismatch=allow_base_mismatch,
        status=status,
    )
    _check_plan(plan)
    if there is not None and there.manifest.base.fingerprint != base.fingerprint:
        raise BaseMismatchError(
            f"'{fleet}' is a bundle of another base model; pass the bundle of this base, or a new one"
        )
    graph = base.load()
    adapted = apply_adapter(graph, adapter, plan)
    with tempfile.TemporaryDirectory(prefix="deployfa-delta-") as folder:
        scratch = Path(folder)
        if there is None:
            fresh = _Fresh(base, graph, adapter, plan, target, fresh_optimize, rows, shapes, threads)
            bundle, fused = _write_fleet(fleet, adapted, fresh, scratch, say)
        else:
            bundle, fused = there, fuse(adapted, there.manifest.optimization.chosen)
        try:
            tensors = changed_tensors(load_graph(bundle.graph), fused)
        except StructureDiffers as difference:
            raise _impossible(difference, graph, adapter, plan, fleet) from difference
        for name, array in tensors.items():
            if array.dtype.name not in _STORED:
                raise PlanError(
                    f"tensor '{name}' is {array.dtype.name}, and a patch holds floating-point tensors only; export a "
                    "bundle, without --delta"
                )
        if not tensors:
            raise LeftoverError(f"the adapter changes no tensor of '{fleet}', so there is nothing to ship")
        say("computing the reference in float64")
        cases, noise = graph_truth(graph, adapter, read_cases(bundle.reference))
        check_effect(adapter, cases, noise)
        error = _check_session(bundle, tensors, fused, cases, noise, scratch)
    say(f"writing '{out}'")
    meta = PatchMeta(
        bundle=graph_files(bundle.manifest),
        fusion=bundle.manifest.optimization.chosen,
        base=BaseReference(
            name=base.name, fingerprint=base.fingerprint, architecture=base.architecture, task=adapter.base.task
        ),
        adapter=summary(adapter),
        plan=msgspec.to_builtins(plan),
        labels=list(adapter.labels or base.labels),
        versions=versions(),
        noise=noise.relative,
        noise_max_abs=noise.max_abs,
        error=error,
        truth=_bytes([case.truth for case in cases], "<f8"),
        base_answers=_bytes([case.base for case in cases], "<f4"),
    )
    write_patch(out, tensors, meta, force=force)
    patched = Bundle.open(fleet, patch=out)
    assert patched.patch is not None
    return Delta(patched.patch, patched, plan, there is None, base.made_now, base.warnings)


@dataclass(frozen=True, eq=False)
class _Fresh:
    """What a fleet bundle that is not there yet is made from."""

    base: BaseGraph
    graph: ir.Model
    adapter: Adapter
    plan: Plan
    target: str
    optimize: str
    rows: Sequence[Row] | None
    shapes: Sequence[Shape]
    threads: int | None


def _write_fleet(
    fleet: Path, adapted: ir.Model, fresh: _Fresh, scratch: Path, say: Callable[[str], None]
) -> tuple[Bundle, ir.Model]:
    """The fleet bundle, and the adapted graph with the same fusion.

    Every edit at strength 0 gives the base's numbers in the adapted graph's structure, but for equal tensors, which a
    fusion merges again; so they are put into the fused adapted graph, which has kept them apart.
    """
    say(f"the bundle '{fleet}' is not there yet: computing its reference in float64")
    plain = without_edits(fresh.adapter)
    cases, noise = reference(fresh.base, fresh.graph, plain, fresh.rows)
    still = apply_adapter(fresh.graph, with_strength(fresh.adapter, 0.0), fresh.plan)
    chosen, fused_still = choose_fusion(
        still, fresh.optimize, cases, noise, fresh.shapes, scratch, threads=fresh.threads, status=say
    )
    fused = fuse(adapted, chosen.chosen)
    try:
        ours = with_tensors(fused, changed_tensors(fused, fused_still))
    except StructureDiffers as difference:
        raise _impossible(difference, fresh.graph, fresh.adapter, fresh.plan, fleet) from difference
    fusions = compare_fusions(headed(fresh.graph, plain), still, chosen.chosen, fused=ours)
    plan = make_plan(fresh.graph, plain)
    say(f"writing '{fleet}'")
    content = Content(plain, fresh.base, plan, ours, chosen, fusions, fresh.target, cases, noise)
    return write_bundle(fleet, content), fused


def _check_plan(plan: Plan) -> None:
    for edit in plan.edits:
        if edit.placement == SIDE_OP:
            raise PlanError(
                f"site '{edit.site}' needs a side op ({edit.reason}), which adds operators, and a patch can only "
                "change numbers; export a bundle, without --delta"
            )


def _impossible(difference: StructureDiffers, graph: ir.Model, adapter: Adapter, plan: Plan, fleet: Path) -> PlanError:
    """The site that the differing names belong to, its placement, and what to do."""
    owners = {edit.site: f"site '{edit.site}' ({edit.placement})" for edit in plan.edits}
    owners |= {module.path: f"module '{module.path}' (replaced)" for module in plan.modules}
    named = [path for name in difference.names for path in owners if f"{name}.".startswith((f"{path}.", f"{path}/"))]
    what = difference.what
    if named:
        where = owners[max(named, key=len)]
    elif biased := _without_bias(graph, adapter, plan):
        # fusing sorts the nodes anew, so the first that differs may be far from the cause and bear no name of it
        where, what = owners[biased], "its δ becomes a bias where there was none"
    else:
        where = f"the graph at '{(*difference.names, 'its end')[0]}'"
    return PlanError(
        f"{where} has another structure than in '{fleet}': {what}; a patch can only change numbers: export a bundle "
        "without --delta, or write this adapter a fleet bundle of its own with --delta ANOTHER.bundle"
    )


def _without_bias(graph: ir.Model, adapter: Adapter, plan: Plan) -> str | None:
    """The first site whose shift folds into its own weight and that has no bias for it yet."""
    sites = find_sites(graph)
    shifted = [e.site for e in plan.edits if e.placement == OWN_WEIGHT and adapter.edits[e.site].delta is not None]
    return next((path for path in shifted if any(use.bias_value is None for use in sites[path].uses)), None)


def _check_session(
    bundle: Bundle,
    tensors: dict[str, Array],
    fused: ir.Model,
    cases: Sequence[Case],
    noise: Noise,
    scratch: Path,
) -> float:
    """The patched session's error against the truth, once it answered as the full graph does, bit for bit."""
    folder = scratch / "full-graph"
    folder.mkdir()
    full = run_graph(save_graph(fused, folder), cases)
    patched = run_graph(bundle.graph, cases, initializers=tensors)
    if not all(np.array_equal(ours, theirs) for ours, theirs in zip(patched, full, strict=True)):
        raise RuntimeTargetError(
            "the patched session does not answer as the whole graph does, bit for bit; export a bundle, without --delta"
        )
    error = normwise(np.concatenate(patched), np.concatenate([case.truth for case in cases if case.truth is not None]))
    if not error <= LIMIT * noise.relative:
        raise RuntimeTargetError(
            f"the patched session differs from the reference by {error / noise.relative:.1f}x the float32 noise; "
            "try --optimize none with a new bundle"
        )
    return error


def _bytes(answers: Sequence[Array | None], dtype: str) -> bytes:
    return np.concatenate([array for array in answers if array is not None]).astype(dtype).tobytes()
