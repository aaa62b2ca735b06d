"""Choose the fusion by measuring: none of them is the fastest everywhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deployfa.bench import Contender, Shape, bench
from deployfa.bundle.manifest import Candidate, Optimization
from deployfa.errors import DeployfaError, MissingExtraError, RuntimeTargetError
from deployfa.graph.index_ranges import index_ranges
from deployfa.graph.optimize import FUSIONS, fuse
from deployfa.graph.storage import save_graph
from deployfa.parity.cases import Case
from deployfa.parity.measures import LIMIT, normwise, unmasked
from deployfa.parity.noise import Noise
from deployfa.parity.truth import run_graph

__all__ = ["choose_fusion"]

#: A fusion must win by more than this to be taken over an earlier, simpler one: less is within a short bench's spread.
_MARGIN = 0.02
#: Token ids are drawn from so many, or from as many as the model knows.
_VOCABULARY = 1000


def choose_fusion(
    model: ir.Model,
    asked: str,
    cases: Sequence[Case],
    noise: Noise,
    shapes: Sequence[Shape],
    scratch: Path,
    *,
    threads: int | None = None,
    finish: Callable[[ir.Model], ir.Model] = ir.Model.clone,
    status: Callable[[str], None] | None = None,
) -> tuple[Optimization, ir.Model]:
    """The fused graph and the record of what was tried.

    A candidate that differs from the reference by more than ``LIMIT`` times the noise is refused; the fastest of the
    rest, by the geometric mean of its medians over ``shapes``, wins.  ``finish`` makes of a fused graph what is judged
    and timed, where that is more than the graph that is returned.  Raises ``RuntimeTargetError`` if none is left.
    """
    say = status or (lambda _: None)
    tried: dict[str, Candidate] = {}
    models: dict[str, ir.Model] = {}
    graphs: dict[str, Path] = {}
    signatures: dict[tuple[str, ...], str] = {}
    for name in FUSIONS if asked == "auto" else (asked,):
        say(f"building the graph with fusion '{name}'")
        try:
            candidate = fuse(model, name)
        except (MissingExtraError, RuntimeTargetError) as error:
            if asked != "auto":
                raise
            tried[name] = Candidate(name=name, refused=str(error))
            continue
        signature = _signature(candidate)
        if signature in signatures:
            tried[name] = Candidate(name=name, refused=f"same graph as '{signatures[signature]}'")
            continue
        signatures[signature] = name
        folder = scratch / name
        folder.mkdir()
        path = save_graph(finish(candidate), folder)
        error_found, refused = _agreement(path, cases, noise)
        tried[name] = Candidate(name=name, error=error_found, refused=refused)
        if refused is None:
            models[name], graphs[name] = candidate, path
    if not models:
        reasons = "; ".join(f"{name}: {candidate.refused}" for name, candidate in tried.items())
        raise RuntimeTargetError(f"no fusion gives a graph that agrees with its reference ({reasons})")
    medians = _time(graphs, shapes, index_ranges(model), threads, say) if len(graphs) > 1 else {}
    for name, by_shape in medians.items():
        tried[name] = Candidate(name=name, error=tried[name].error, median_ms=by_shape)
    chosen = _fastest(list(models), medians)
    record = Optimization(
        asked=asked,
        chosen=chosen,
        shapes=[str(shape) for shape in shapes],
        threads=threads or 0,
        tried=list(tried.values()),
    )
    return record, models[chosen]


def _agreement(path: Path, cases: Sequence[Case], noise: Noise) -> tuple[float | None, str | None]:
    try:
        found = np.concatenate(run_graph(path, cases))
    except DeployfaError as error:
        return None, str(error)
    truth = np.concatenate([case.truth for case in cases if case.truth is not None])
    error_found = normwise(*unmasked(found, truth))
    if not error_found <= LIMIT * noise.relative:
        return error_found, f"differs from the reference by {error_found / noise.relative:.1f}x the float32 noise"
    return error_found, None


def _time(
    graphs: dict[str, Path],
    shapes: Sequence[Shape],
    ranges: Mapping[str, int],
    threads: int | None,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """``ranges``: how many tokens, and positions, a small model knows."""
    longest = ranges.get("position_ids", sys.maxsize) - 1
    shapes = [Shape(shape.batch, max(1, min(shape.sequence, longest))) for shape in shapes]
    say(f"timing {len(graphs)} fusions at {', '.join(map(str, shapes))}")
    report = bench(
        [Contender(label=name, graph=path) for name, path in graphs.items()],
        shapes,
        threads=threads,
        launches=1,
        min_samples=11,
        max_seconds_per_shape=6.0,
        vocabulary=min(_VOCABULARY, ranges.get("input_ids", _VOCABULARY)),
        flops=False,
        bare_matmul=False,
    )
    medians: dict[str, dict[str, float]] = {}
    for result in report.results:
        if result.p50_ms is not None:
            medians.setdefault(result.contender, {})[f"{result.batch}x{result.sequence}"] = round(result.p50_ms, 4)
    return medians


def _fastest(names: Sequence[str], medians: dict[str, dict[str, float]]) -> str:
    def typical(name: str) -> float:
        values = medians.get(name, {}).values()
        return math.exp(sum(map(math.log, values)) / len(values)) if values else math.inf

    best = names[0]
    for name in names[1:]:
        if typical(name) < typical(best) * (1 - _MARGIN):
            best = name
    return best


def _signature(model: ir.Model) -> tuple[str, ...]:
    """Operators and weights in order: two fusions that gave the same graph need not be timed twice."""
    nodes = [f"{node.domain}::{node.op_type}:{len(node.inputs)}" for node in model.graph.all_nodes()]
    weights = [str(value.shape) for value in model.graph.initializers.values()]
    return (*nodes, *sorted(weights))
