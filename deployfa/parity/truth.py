"""Where the truth comes from: PyTorch in float64 when it is here, the unfolded graph in float64 when it is not."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Array
from deployfa.errors import DataError
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import make_plan
from deployfa.graph.rewrite import apply_adapter
from deployfa.graph.storage import save_graph
from deployfa.parity.cases import Case, of_one_token
from deployfa.parity.noise import MOST_RUNS, Noise, neighbours
from deployfa.preprocess.language import Piece
from deployfa.runtimes.targets import DEFAULT_TARGET, open_runner

if TYPE_CHECKING:
    from torch import nn

    from deployfa.training.base import Base

__all__ = [
    "GRAPH_TRUTH",
    "TORCH_TRUTH",
    "graph_truth",
    "neighbouring",
    "run_graph",
    "torch_log_likelihoods",
    "torch_truth",
    "without_edits",
]

TORCH_TRUTH = "PyTorch float64, adapter unfolded"
#: Operator → which of its inputs is the weight.
_WEIGHTS = {"Conv": 1, "ConvTranspose": 1, "Gather": 0, "Gemm": 1, "MatMul": 1}
GRAPH_TRUTH = "base graph float64, adapter as side ops"


def without_edits(adapter: Adapter) -> Adapter:
    """The adapter's replaced modules alone: what its edits are measured against."""
    return dataclasses.replace(adapter, edits={})


def graph_truth(
    base: ir.Model, adapter: Adapter, cases: Sequence[Case], *, runs: int = MOST_RUNS, seed: int = 0
) -> tuple[list[Case], Noise]:
    """Truth without torch: every edit as a side op on the base graph, evaluated in float64 by numpy.

    Independent of every fold and fusion; the base graph itself was held against PyTorch when it was exported.  The
    noise is that of ONNX Runtime on the same unfolded graph with its optimisations off, over so many ``runs`` at most;
    another ``seed`` draws other weights for them.
    """
    output = base.graph.outputs[0].name or ""
    feeds = [case.feeds for case in cases]
    unfolded = apply_adapter(base, adapter, make_plan(base, adapter, placement="side-op"))
    plain = without_edits(adapter)
    headed = apply_adapter(base, plain, make_plan(base, plain))
    double = [of_one_token(outputs[output]) for outputs in evaluate(unfolded, feeds)]
    with tempfile.TemporaryDirectory(prefix="deployfa-truth-") as scratch:
        graph = _saved(unfolded, Path(scratch) / "unfolded")

        def run(number: int) -> list[Array]:
            weights = neighbouring(unfolded, seed + number) if number else None
            return run_graph(graph, cases, optimize=False, initializers=weights)

        noise = Noise.of(run, double, most=runs)
        bases = run_graph(_saved(headed, Path(scratch) / "base"), cases, optimize=False)
    return _with_truth(cases, double, bases), noise


def neighbouring(model: ir.Model, seed: int) -> dict[str, Array]:
    """The float32 weights of the layers of ``model`` as another rounding might have left them, by name.

    Nothing else moves: a mask of zeros and ones times 1e4 would make noise of what is none.
    """
    return {
        value.name or "": neighbours(value.const_value.numpy(), (seed, number))
        for number, value in enumerate(model.graph.initializers.values())
        if value.const_value is not None
        and value.dtype == ir.DataType.FLOAT
        and sum(size > 1 for size in value.const_value.shape.numpy()) > 1
        and _weighs(value)
    }


def _weighs(value: ir.Value) -> bool:
    """Whether a layer reads ``value`` as its weight, transposed or not."""
    for node, index in value.uses():
        if node.op_type in {"Transpose", "Identity"}:
            if _weighs(node.outputs[0]):
                return True
        elif index == _WEIGHTS.get(node.op_type):
            return True
    return False


def run_graph(
    graph: Path,
    cases: Sequence[Case],
    *,
    target: str = DEFAULT_TARGET,
    optimize: bool = True,
    threads: int | None = None,
    initializers: Mapping[str, Array] | None = None,
    bound: Mapping[str, Array] | None = None,
) -> list[Array]:
    """The first output of ``graph`` on ``target`` for every case; ``initializers`` are a patch's, ``bound`` the tables
    of a pack."""
    runner = open_runner(
        target, graph, optimize=optimize, threads=threads, spinning=False, initializers=initializers, bound=bound
    )
    wanted = [spec.name for spec in runner.inputs]
    missing = sorted(set(wanted) - set(cases[0].feeds)) if cases else []
    if missing:
        raise DataError(
            f"the graph wants input '{missing[0]}', which its preprocessing does not give; export the bundle again"
        )
    name = runner.outputs[0].name
    return [of_one_token(runner.run({key: case.feeds[key] for key in wanted})[name]) for case in cases]


def _saved(model: ir.Model, folder: Path) -> Path:
    folder.mkdir()
    return save_graph(model, folder)


def torch_truth(
    model: str | Path, adapter: Adapter, cases: Sequence[Case], *, allow_mismatch: bool = False
) -> tuple[list[Case], Noise, str | None]:
    """Truth from PyTorch, and a warning if the base could not be checked.

    Raises ``BaseMismatchError`` if ``model`` is not the adapter's base.
    """
    import torch

    from deployfa.training.base import load_base_of
    from deployfa.training.reference import check_base, float64_throughout, load_adapted

    base = load_base_of(adapter, model)
    warning = check_base(base, adapter, allow_mismatch=allow_mismatch)
    with float64_throughout():
        double = _run(load_adapted(base, adapter, dtype=torch.float64), cases)
    bases = _run(load_adapted(base, adapter, dtype=torch.float32, edits=False), cases)
    noise = Noise.of(lambda seed: _float32_run(base, adapter, cases, seed), double)
    return _with_truth(cases, double, bases), noise, warning


def torch_log_likelihoods(model: str | Path, adapter: Adapter, found: Sequence[Piece], *, pad: int) -> Array:
    """Of every token that ``found`` says, (tokens,), by PyTorch in float32 with the adapter unfolded."""
    import torch

    from deployfa.training.base import load_base_of
    from deployfa.training.language_examples import log_likelihoods
    from deployfa.training.reference import load_adapted

    base = load_base_of(adapter, model)
    return log_likelihoods(load_adapted(base, adapter, dtype=torch.float32), found, pad)


def _float32_run(base: Base, adapter: Adapter, cases: Sequence[Case], seed: int) -> list[Array]:
    """The model as it is, or with its weights as another rounding might have left them; every second time by PyTorch's
    own convolutions instead of oneDNN's, whose sums are shorter than those of other runtimes."""
    import torch

    from deployfa.training.reference import load_adapted

    model = load_adapted(base, adapter, dtype=torch.float32)
    for number, weight in enumerate(model.parameters() if seed else ()):
        if weight.dim() > 1 and weight.is_floating_point():
            weight.data = torch.from_numpy(neighbours(weight.detach().numpy(), (seed, number)))
    onednn: Any = torch.backends.mkldnn
    before = onednn.enabled
    try:
        onednn.enabled = before and seed % 2 == 0
        return _run(model, cases)
    finally:
        onednn.enabled = before


def _run(model: nn.Module, cases: Sequence[Case]) -> list[Array]:
    import torch

    from deployfa.training.reference import answer

    with torch.inference_mode():
        return [of_one_token(answer(model, case.feeds)) for case in cases]


def _with_truth(cases: Sequence[Case], truths: Sequence[Array], bases: Sequence[Array]) -> list[Case]:
    return [
        dataclasses.replace(case, truth=truth, base=base)
        for case, truth, base in zip(cases, truths, bases, strict=True)
    ]
