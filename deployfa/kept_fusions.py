"""Which of the runtime's fusions an adapter keeps: the fused operators of the base graph against those of the adapted.

A folded edit changes numbers and must keep them all.  A side op puts operators where a fusion looks for others: with
different edits on queries, keys and values their weights cannot be packed into one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import msgspec
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.bundle.manifest import FusedCount
from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError
from deployfa.graph import Plan, apply_adapter, make_plan
from deployfa.graph.optimize import FUSIONS, fuse
from deployfa.graph.plan import SIDE_OP
from deployfa.graph.storage import save_graph
from deployfa.parity.truth import without_edits
from deployfa.runtimes.fused_operators import fused_operators

__all__ = ["PlanFusions", "compare_fusions", "describe_losses", "plan_fusions"]

#: Above this many bytes of weights a plan does not count: it would take longer than a plan may.
LARGE_BYTES = 2_000_000_000


class PlanFusions(msgspec.Struct, frozen=True, kw_only=True):
    """``measured``: a fusion of ``--optimize`` → fused operator → how many the base graph and the planned graph run.
    ``skipped``: a fusion, or ``auto`` for all of them → why it was not counted here."""

    measured: dict[str, dict[str, FusedCount]]
    skipped: dict[str, str]

    def warnings(self) -> Iterator[str]:
        """A line for each fusion that the side ops cost something, or that was not counted."""
        for name, counts in self.measured.items():
            if lost := describe_losses(counts):
                yield f"with --optimize {name}, the side ops cost fusions of the runtime: {lost}"
        for name, reason in self.skipped.items():
            yield f"fusions of --optimize {name} not counted: {reason}"


def compare_fusions(
    base: ir.Model, adapted: ir.Model, fusion: str, *, fused: ir.Model | None = None
) -> dict[str, FusedCount]:
    """Fused operator → how many a session of ``base`` and one of ``adapted`` run, both fused by ``fusion``.

    Both are unfused graphs; ``fused`` is ``adapted`` after the fusion, where that is there already.  See
    ``deployfa.runtimes.fused_operators`` for the names.
    """
    before = _count(fuse(base, fusion), base)
    after = _count(fused if fused is not None else fuse(adapted, fusion), adapted)
    names = sorted({*before, *after})
    return {name: FusedCount(base=before.get(name, 0), adapted=after.get(name, 0)) for name in names}


def plan_fusions(
    graph: ir.Model,
    adapter: Adapter,
    plan: Plan,
    *,
    optimize: str = "auto",
    status: Callable[[str], None] | None = None,
) -> PlanFusions | None:
    """What ``plan`` costs in fusions: it is carried out on the base graph ``graph`` and both are counted.

    ``optimize`` is a key of ``FUSIONS``, or ``auto`` for all of them.  ``None`` if the plan has no side op: a fold
    costs none, and export counts again.  What cannot be counted here (no onnxruntime, a graph above ``LARGE_BYTES``) is
    ``skipped``.  Raises ``InputError`` for an unknown fusion.
    """
    if optimize != "auto" and optimize not in FUSIONS:
        raise InputError(f"no fusion '{optimize}'; use auto or one of: {', '.join(FUSIONS)}")
    if not plan.count(SIDE_OP):
        return None
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value)
    if weights > LARGE_BYTES:
        reason = (
            f"the graph has {weights / 1e9:.1f} GB of weights, and counting copies them; export counts what it writes"
        )
        return PlanFusions(measured={}, skipped={optimize: reason})
    if find_spec("onnxruntime") is None:
        missing = MissingExtraError("onnxruntime", "cpu", "finding out what a session fuses")
        return PlanFusions(measured={}, skipped={optimize: str(missing)})
    plain = without_edits(adapter)
    base = apply_adapter(graph, plain, make_plan(graph, plain))
    adapted = apply_adapter(graph, adapter, plan)
    measured: dict[str, dict[str, FusedCount]] = {}
    skipped: dict[str, str] = {}
    for name in FUSIONS if optimize == "auto" else (optimize,):
        if status:
            status(f"counting what the runtime fuses with fusion '{name}'")
        try:
            measured[name] = compare_fusions(base, adapted, name)
        except (MissingExtraError, RuntimeTargetError) as error:
            skipped[name] = str(error)
    return PlanFusions(measured=measured, skipped=skipped)


def describe_losses(counts: Mapping[str, FusedCount]) -> str | None:
    """``1 of 6 packed MatMul (3 in 1); it has 1 packed MatMul (2 in 1) more``; ``None`` if nothing is lost."""
    lost = [
        f"{count.base - count.adapted} of {count.base} {_short(name)}"
        for name, count in counts.items()
        if count.adapted < count.base
    ]
    gained = [
        f"{count.adapted - count.base} {_short(name)}" for name, count in counts.items() if count.adapted > count.base
    ]
    if not lost:
        return None
    return ", ".join(lost) + (f"; it has {', '.join(gained)} more" if gained else "")


def _count(fused: ir.Model, unfused: ir.Model) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="deployfa-fusions-") as scratch:
        return fused_operators(save_graph(fused, Path(scratch)), unfused)


def _short(name: str) -> str:
    return name.rpartition("::")[2]
