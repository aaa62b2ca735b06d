"""The precisions that an engine can have, each by what it does to the graph: an engine takes its types from there."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.graph.precision import Precision, type_graph
from deployfa.graph.storage import save_graph
from deployfa.parity.cases import Case, of_one_token
from deployfa.parity.measures import LIMIT, normwise, unmasked
from deployfa.quantise import quantise
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

__all__ = ["PRECISIONS", "Judge", "Lowered", "lower", "stored_judge"]
#: Of float32's 24 bits, float16 keeps 11 and bfloat16 8.
_COARSER: dict[Precision, float] = {"fp16": 2.0**13, "bf16": 2.0**16}


@dataclass(frozen=True, eq=False)
class Judge:
    """What a lowered graph is judged by.

    feeds: the stored reference's, one call each.  error: of a graph against it, normwise relative.  noise: what float32
    has of it; effect: how far the adapter moves the answers from the base's, in the same measure.
    """

    feeds: Sequence[Mapping[str, Array]]
    error: Callable[[ir.Model], float]
    noise: float
    effect: float


def stored_judge(cases: Sequence[Case], defaults: Mapping[str, Array], noise: float) -> Judge:
    """By a stored reference, whose ``cases`` carry their truth, in ONNX Runtime on the CPU.

    defaults: of inputs that a case does not feed.  noise: the reference's own.
    """
    truth = np.concatenate([case.truth for case in cases if case.truth is not None])
    base = np.concatenate([case.base for case in cases if case.base is not None])
    feeds = [{**defaults, **case.feeds} for case in cases]

    def error(model: ir.Model) -> float:
        with tempfile.TemporaryDirectory(prefix="deployfa-judge-") as folder:
            runner = OnnxRuntimeRunner(save_graph(model, Path(folder)), spinning=False)
            output = runner.outputs[0].name
            fed = [{spec.name: feed[spec.name] for spec in runner.inputs} for feed in feeds]
            found = [runner.run(each)[output].astype(np.float64) for each in fed]
        return normwise(*unmasked(np.concatenate([of_one_token(each) for each in found]), truth))

    return Judge(feeds, error, noise, normwise(*unmasked(base, truth)))


@dataclass(frozen=True, eq=False)
class Lowered:
    """A typed graph.

    low, kept: operator → how many nodes compute in ``precision``, and in float32 still; reasons: operator → why the
    latter.  limit: the error that it may have.
    """

    model: ir.Model
    precision: str
    low: dict[str, int]
    kept: dict[str, int]
    limit: float
    reasons: dict[str, str] = field(default_factory=dict)


def lower(model: ir.Model, precision: str, judge: Judge) -> Lowered:
    """``model``, whose nodes have names, in ``precision``, a key of ``PRECISIONS``.

    A float type may have ``LIMIT`` times the float32 noise, times how much coarser it rounds.  Nothing of the kind
    bounds int8: it may lose half of what the adapter adds, or the adapter would not be what is deployed.
    """
    return PRECISIONS[precision](model, judge)


def _float32(model: ir.Model, judge: Judge) -> Lowered:
    return Lowered(model, "fp32", {}, {}, LIMIT * judge.noise)


def _float(precision: Precision, model: ir.Model, judge: Judge) -> Lowered:
    typed = type_graph(model, precision)
    kept = {op: each.count for op, each in typed.kept.items()}
    reasons = {op: each.reason for op, each in typed.kept.items()}
    limit = LIMIT * judge.noise * _COARSER[precision]
    return Lowered(typed.model, precision, dict(typed.low), kept, limit, reasons)


def _int8(model: ir.Model, judge: Judge) -> Lowered:
    quantised, chosen = quantise(model, judge.feeds, judge.error, allowed=judge.effect / 2)
    low = Counter(node.op_type for node in model.graph if node.name in set(chosen))
    products = Counter(node.op_type for node in model.graph if node.op_type in low)
    kept = {op: count - low[op] for op, count in products.items() if count > low[op]}
    return Lowered(quantised, "int8", dict(sorted(low.items())), kept, judge.effect / 2)


PRECISIONS: dict[str, Callable[[ir.Model, Judge], Lowered]] = {
    "fp32": _float32,
    "fp16": partial(_float, "fp16"),
    "bf16": partial(_float, "bf16"),
    "int8": _int8,
}
