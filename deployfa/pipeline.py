"""The whole way in one file: adapter + base graph → plan → rewrite → fuse → bundle."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx_ir as ir

from deployfa.adapter import Adapter, BaseReference
from deployfa.atomic import check_output, write_directory
from deployfa.base_graphs import BaseGraph, base_graph, copy_preprocessor
from deployfa.bench import Shape
from deployfa.bundle import Bundle, Manifest
from deployfa.bundle.bundle import sha256_file, versions, write_manifest
from deployfa.bundle.manifest import (
    FORMAT,
    MANIFEST,
    AdapterSummary,
    FusedCount,
    GraphSummary,
    Optimization,
    Reference,
    Slots,
    Tables,
    Tensor,
)
from deployfa.data import Row
from deployfa.errors import InputError, LeftoverError
from deployfa.fusion import choose_fusion
from deployfa.graph import Plan, apply_adapter, make_plan
from deployfa.graph.optimize import FUSIONS, fuse
from deployfa.graph.plan import Prefer, Preference
from deployfa.graph.storage import GRAPH, save_graph
from deployfa.kept_fusions import compare_fusions, describe_losses
from deployfa.parity.cases import Case, make_cases, write_cases
from deployfa.parity.decoding import with_decoding
from deployfa.parity.noise import Noise
from deployfa.parity.truth import GRAPH_TRUTH, graph_truth, without_edits
from deployfa.preprocess import Preprocessor, PromptPreprocessor
from deployfa.runtimes.targets import DEFAULT_TARGET, check_target

__all__ = [
    "DEFAULT_SHAPES",
    "Content",
    "Exported",
    "check_effect",
    "check_export_options",
    "export",
    "fused_base",
    "headed",
    "plan_adapter",
    "reference",
    "reference_preprocessor",
    "stored_reference",
    "summary",
    "write_bundle",
]

Status = Callable[[str], None]
DEFAULT_SHAPES = (Shape(1, 128), Shape(8, 128))
_REFERENCE = "reference.safetensors"
#: Tokens of a prompt in the stored reference, at most.
_LONGEST_PROMPT = 256


@dataclass(frozen=True, eq=False)
class Exported:
    """A written bundle and whether PyTorch had to run for it."""

    bundle: Bundle
    plan: Plan
    ran_torch: bool
    warnings: tuple[str, ...]


def plan_adapter(
    adapter: Adapter,
    *,
    model: str | Path | None = None,
    placement: Preference = "auto",
    prefer: Prefer = "smallest-patch",
    untie: bool = False,
    require_fold: bool = False,
    allow_base_mismatch: bool = False,
    status: Status | None = None,
) -> tuple[Plan, BaseGraph]:
    """Where every edit of ``adapter`` would go, without doing it."""
    base = base_graph(adapter, model=model, allow_mismatch=allow_base_mismatch, status=status)
    plan = make_plan(base.load(), adapter, placement=placement, prefer=prefer, untie=untie, require_fold=require_fold)
    return plan, base


def export(
    adapter: Adapter,
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
    status: Status | None = None,
) -> Exported:
    """Write the bundle of ``adapter`` to ``out``, whole or not at all.

    ``optimize``: ``auto`` times every fusion at ``shapes`` and keeps the fastest that agrees with the reference; or a
    key of ``deployfa.graph.optimize.FUSIONS``.  ``rows``: for the stored reference, built-in samples if none.
    Neither the adapter nor the base is changed.
    """
    say = status or (lambda _: None)
    optimize = check_export_options(target, optimize)
    check_output(out, force=force, holding=MANIFEST)
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
    say(f"placing {len(plan.edits)} edits: {plan.folded} folded, {plan.count('side op')} side ops")
    graph = base.load()
    adapted = apply_adapter(graph, adapter, plan)
    say("computing the reference in float64")
    with tempfile.TemporaryDirectory(prefix="deployfa-export-") as scratch:
        cases, noise = reference(base, graph, adapter, rows)
        check_effect(adapter, cases, noise)
        chosen, fused = choose_fusion(
            adapted, optimize, cases, noise, shapes, Path(scratch), threads=threads, status=say
        )
        say("counting what the runtime fuses")
        fusions = compare_fusions(headed(graph, adapter), adapted, chosen.chosen, fused=fused)
        say(f"writing '{out}'")
        content = Content(adapter, base, plan, fused, chosen, fusions, target, cases, noise)
        bundle = write_bundle(out, content, force=force)
    lost = describe_losses(fusions)
    warnings = (*base.warnings, f"the adapter costs fusions of the runtime: {lost}") if lost else base.warnings
    return Exported(bundle, plan, base.made_now, warnings)


@dataclass(frozen=True, eq=False)
class Content:
    """Everything that a bundle is written from; ``cases`` carry their truth."""

    adapter: Adapter
    base: BaseGraph
    plan: Plan
    fused: ir.Model
    optimization: Optimization
    fusions: dict[str, FusedCount]
    target: str
    cases: Sequence[Case]
    noise: Noise
    #: of a pack, which has no one adapter: what the manifest says, and what writes its own files
    tables: Tables | None = None
    summary: AdapterSummary | None = None
    write: Callable[[Path], None] | None = None
    slots: Slots | None = None


def write_bundle(out: Path, content: Content, *, force: bool = False) -> Bundle:
    """Write the directory and open it, which checks it."""
    with write_directory(out, force=force) as folder:
        save_graph(content.fused, folder, share_equal=content.slots is not None)
        copy_preprocessor(content.base, folder)
        if content.write is None:
            content.adapter.save(folder / "adapter.safetensors")
        else:
            content.write(folder)
        write_cases(folder / _REFERENCE, content.cases)
        write_manifest(folder, _manifest(folder, content))
    return Bundle.open(out)


def check_export_options(target: str, optimize: str) -> str:
    """The fusion to make; raises ``InputError`` for an unknown target or fusion before long work starts.

    Fusions are timed on the CPU: for another target ``auto`` is ``none``, which leaves them to its runtime.  TensorRT
    runs standard operators and no others.
    """
    check_target(target)
    if optimize != "auto" and optimize not in FUSIONS:
        raise InputError(f"no fusion '{optimize}'; use auto or one of: {', '.join(FUSIONS)}")
    if target == DEFAULT_TARGET:
        return optimize
    if "tensorrt" in target and optimize not in {"auto", "none"}:
        raise InputError("TensorRT fuses for itself and does not know ONNX Runtime's operators; pass --optimize none")
    return "none" if optimize == "auto" else optimize


def fused_base(bundle: Bundle, folder: Path, *, model: str | Path | None = None) -> Path:
    """The base graph of ``bundle``, same head and same fusion but no edits, written to ``folder``: what its latency is
    compared with.  Raises ``InputError`` for a pack, whose heads have no base of their own."""
    if bundle.manifest.tables is not None:
        raise InputError(f"'{bundle.path}' is a pack; bench it against a bundle of one adapter: name that one first")
    # the manifest's base is the one it was exported on, also where a mismatch was allowed
    adapter = dataclasses.replace(Adapter.load(bundle.adapter), base=bundle.manifest.base)
    base = base_graph(adapter, model=model)
    return save_graph(fuse(headed(base.load(), adapter), bundle.manifest.optimization.chosen), folder)


def headed(graph: ir.Model, adapter: Adapter) -> ir.Model:
    """The base graph with the adapter's replaced modules and none of its edits."""
    plain = without_edits(adapter)
    return apply_adapter(graph, plain, make_plan(graph, plain))


def reference_preprocessor(base: BaseGraph) -> Preprocessor:
    """What feeds a stored reference: a whole context in float64 takes gigabytes, and says no more than a short one."""
    preprocessor = base.preprocessor()
    return preprocessor.cut(_LONGEST_PROMPT) if isinstance(preprocessor, PromptPreprocessor) else preprocessor


def reference(
    base: BaseGraph, graph: ir.Model, adapter: Adapter, rows: Sequence[Row] | None
) -> tuple[list[Case], Noise]:
    """The stored reference of a bundle, on ``rows`` or on built-in samples, and the noise it is judged by."""
    preprocessor = reference_preprocessor(base)
    items = [row.item for row in rows] if rows else preprocessor.samples
    cases = make_cases(preprocessor, items)
    if isinstance(preprocessor, PromptPreprocessor):
        cases = with_decoding(preprocessor, graph, cases)
    return graph_truth(graph, adapter, cases)


def check_effect(adapter: Adapter, cases: Sequence[Case], noise: Noise) -> None:
    """Promise 1: a trained adapter that changes nothing is an error."""
    if noise.silent(cases) and any(edit.distance() > 0.0 for edit in adapter.edits.values()):
        raise LeftoverError(
            "the adapter is trained, but the graph answers exactly as its base does; nothing was written"
        )


def _manifest(folder: Path, content: Content) -> Manifest:
    adapter, base, fused = content.adapter, content.base, content.fused
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    return Manifest(
        format=FORMAT,
        target=content.target,
        base=BaseReference(
            name=base.name,
            fingerprint=base.fingerprint,
            architecture=base.architecture,
            task=adapter.base.task,
        ),
        adapter=content.summary or summary(adapter),
        plan=msgspec.to_builtins(content.plan),
        graph=GraphSummary(
            file=GRAPH,
            opset=fused.opset_imports.get("", 0),
            inputs=[_tensor(value) for value in fused.graph.inputs],
            outputs=[_tensor(value) for value in fused.graph.outputs],
            bytes=sum(file.stat().st_size for file in files if file.name.startswith(GRAPH)),
        ),
        optimization=content.optimization,
        fusions=content.fusions,
        preprocessing=base.preprocessing,
        reference=stored_reference(_REFERENCE, content.cases, content.noise),
        labels=list(adapter.labels or base.labels),
        versions=versions(),
        files={file.name: sha256_file(file) for file in files},
        warnings=list(base.warnings),
        tables=content.tables,
        slots=content.slots,
    )


def stored_reference(file: str, cases: Sequence[Case], noise: Noise) -> Reference:
    """What a manifest says of reference outputs in ``file``."""
    return Reference(
        file=file,
        kind=GRAPH_TRUTH,
        rows=sum(case.size for case in cases),
        noise=noise.relative,
        noise_max_abs=noise.max_abs,
    )


def summary(adapter: Adapter) -> AdapterSummary:
    """What a manifest says of an adapter."""
    return AdapterSummary(
        method=adapter.method,
        sites=len(adapter.edits),
        parameters=adapter.parameters,
        module_parameters=adapter.module_parameters,
        training=dict(adapter.training),
    )


def _tensor(value: ir.Value) -> Tensor:
    shape: list[int | str] = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
    return Tensor(name=value.name or "", dtype=value.dtype.numpy().name if value.dtype else "", shape=shape)
