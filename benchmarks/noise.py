"""How often a bundle that is right would be refused, by how its model's float32 noise is measured.

    python benchmarks/noise.py digits.pt=digits/mnist_test.npz vefa.pt=data/movies_test.csv --out benchmarks/results

Around each adapter others are drawn: random numbers are added to its λ and its head.  Each is placed as ``export``
would, folded and as side ops, and run by ONNX Runtime with its optimisations off and on; how far the answers are from
PyTorch in float64 is held against one float32 run of PyTorch, against what ``verify`` takes for the noise, and against
what ``export`` stores as such.  Nothing is wrong with any of them: what is beyond the limit is refused by chance.
Writes ``noise.json`` and ``noise.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from rich.progress import Progress

from deployfa.adapter import Adapter
from deployfa.atomic import write_file
from deployfa.edits import Array
from deployfa.graph.rewrite import apply_adapter
from deployfa.graph.storage import save_graph
from deployfa.parity.cases import Case, make_cases
from deployfa.parity.measures import LIMIT, normwise
from deployfa.parity.noise import Noise
from deployfa.parity.truth import neighbouring, run_graph, torch_truth
from deployfa.pipeline import plan_adapter
from deployfa.task_rows import rows_of
from deployfa.tasks import task_of

__all__ = ["STAGES", "Drawn", "NoiseReport", "main", "markdown"]

STAGES = ("folded, optimisations off", "folded, on", "side ops, optimisations off", "side ops, on")
#: Standard deviation of what is added: to λ, and to a head relative to that of its own numbers.
_LAMBDA, _HEAD = 0.03, 0.5
#: Seeds from here on: not the draws that the rule was found with.
_FIRST = 1000


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter.  one_run: error of one float32 run of PyTorch; noise: what ``verify`` takes for it, stored: what
    ``export`` does; stages: error of each of ``STAGES``.  All normwise, relative to float64."""

    one_run: float
    noise: float
    stored: float
    stages: list[float]


class NoiseReport(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    rows: int
    adapters: list[Drawn]


def around(adapter: Adapter, seed: int) -> Adapter:
    """Another adapter of the same sites."""
    random = np.random.default_rng(seed)

    def moved(array: Array, deviation: float) -> Array:
        return (array + random.normal(0.0, deviation, array.shape)).astype(np.float32)

    edits = {
        site: edit if edit.lam is None else dataclasses.replace(edit, lam=moved(edit.lam, _LAMBDA))
        for site, edit in sorted(adapter.edits.items())
    }
    modules = {
        path: {name: moved(array, _HEAD * float(array.std())) for name, array in sorted(parameters.items())}
        for path, parameters in sorted(adapter.modules.items())
    }
    return dataclasses.replace(adapter, edits=edits, modules=modules)


def draw(adapter: Adapter, cases: list[Case]) -> Drawn:
    """How far one run of PyTorch and each stage is from the truth, and the noise."""
    cases, noise, _ = torch_truth(adapter.base.name, adapter, cases)
    truths = [case.truth for case in cases if case.truth is not None]

    def error(answers: Sequence[Array]) -> float:
        return normwise(np.concatenate(list(answers)).astype(np.float64), np.concatenate(truths))

    stages = []
    for placement in ("auto", "side-op"):
        plan, graph = plan_adapter(adapter, placement=placement)
        placed = apply_adapter(graph.load(), adapter, plan)
        with tempfile.TemporaryDirectory(prefix="deployfa-noise-") as scratch:
            file = save_graph(placed, Path(scratch))
            stages += [error(run_graph(file, cases, optimize=optimize)) for optimize in (False, True)]
            if placement == "side-op":
                # as graph_truth does, but for the truth, which takes minutes in numpy
                stored = Noise.of(partial(rerun, file, placed, cases), truths)
    return Drawn(one_run=error(noise.float32), noise=noise.relative, stored=stored.relative, stages=stages)


def rerun(file: Path, placed: ir.Model, cases: Sequence[Case], seed: int) -> list[Array]:
    """As ``graph_truth`` runs the unfolded graph."""
    return run_graph(file, cases, optimize=False, initializers=neighbouring(placed, seed) if seed else None)


def measure(file: Path, data: Path, *, adapters: int, rows: int, progress: Progress) -> NoiseReport:
    """Draw so many around the adapter in ``file``, on the first rows of ``data``."""
    adapter = Adapter.load(file)
    _, graph = plan_adapter(adapter)
    items = [row.item for row in rows_of(task_of(adapter.base.task), data, most=rows)]
    cases = make_cases(graph.preprocessor(), items)
    numbers = progress.track(range(_FIRST, _FIRST + adapters), description=graph.architecture)
    return NoiseReport(
        model=graph.architecture, rows=len(items), adapters=[draw(around(adapter, seed), cases) for seed in numbers]
    )


def markdown(reports: list[NoiseReport]) -> str:
    """``noise.md``."""
    lines = [
        "# How often a bundle that is right would be refused",
        "",
        "Adapters drawn at random, nothing wrong with any of them: the share of those whose folded bundle is, with or "
        f"without ONNX Runtime's optimisations, more than {LIMIT:g}x the noise from the truth; and the farthest that "
        "any bundle is, side ops among them.",
        "",
        "| model | adapters | rows | noise | refused | farthest |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for report in reports:
        stages = np.array([drawn.stages for drawn in report.adapters])
        ways = {
            "one float32 run": np.array([drawn.one_run for drawn in report.adapters]),
            "as `verify` measures it": np.array([drawn.noise for drawn in report.adapters]),
            "as `export` stores it": np.array([drawn.stored for drawn in report.adapters]),
        }
        for name, noise in ways.items():
            ratios = stages / noise[:, None]
            refused = 100 * float((ratios[:, :2].max(1) > LIMIT).mean())
            figures = f"{len(stages)} | {report.rows} | {name} | {refused:.1f} % | {ratios.max():.2f}x"
            lines.append(f"| {report.model} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="ADAPTER=DATA", help="A trained adapter and rows for its model.")
    parser.add_argument("--adapters", type=int, default=60, help="How many to draw around each.")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True, help="The folder of noise.json and noise.md.")
    options = parser.parse_args()
    with Progress() as progress:
        reports = [
            measure(Path(file), Path(data), adapters=options.adapters, rows=options.rows, progress=progress)
            for file, _, data in (pair.partition("=") for pair in options.pairs)
        ]
    options.out.mkdir(parents=True, exist_ok=True)
    with write_file(options.out / "noise.json", force=True) as aside:
        aside.write_bytes(msgspec.json.format(msgspec.json.encode(reports)))
    with write_file(options.out / "noise.md", force=True) as aside:
        aside.write_text(markdown(reports), encoding="utf-8")
    print(markdown(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
