"""Place an adapter on every layer of every architecture, and hold what comes out against PyTorch in float64.

``python benchmarks/placements.py --out benchmarks/results`` writes ``placements.json`` and ``placements.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from architectures import ARCHITECTURES, Architecture
from placements_table import Measured, Parity, Row, markdown
from torch import nn

from deployfa.adapter import Adapter
from deployfa.atomic import write_file
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import DeployfaError
from deployfa.graph import Plan, apply_adapter, find_sites, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import SIDE_OP
from deployfa.parity.measures import LIMIT, normwise
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.training.base_graph import export_module
from deployfa.training.reference import attach, float64_throughout
from deployfa.versions import installed

__all__ = ["ADAPTERS", "MODES", "Subject", "corrupted", "measure"]

#: Name in the table → keywords of ``make_plan``; ``auto`` prefers the smallest patch.
MODES: dict[str, dict[str, Any]] = {
    "auto": {},
    "prefer own weight": {"prefer": "own-weight"},
    "side op": {"placement": "side-op"},
}
_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
ADAPTERS = ("VeFA", "VeFA + δ", "LoRFA r=4")


class Subject:
    """An architecture, built, exported and run once for all its adapters."""

    def __init__(self, architecture: Architecture) -> None:
        self.model: nn.Module = architecture.model()
        self.feeds = architecture.feeds(architecture.rows)
        self.output = architecture.output or ""
        self.inputs, self.widths = _inputs_of_layers(self.model, self.feeds)
        self.graph = export_module(self.model, architecture.feeds(2), architecture.dynamic)
        if architecture.output is None:
            self.output = self.graph.graph.outputs[0].name or ""
        self.sites = set(find_sites(self.graph)) & set(self.inputs)
        self.not_in_float64: str | None = None

    def adapter(self, kind: str) -> Adapter:
        """A perturbed adapter on every site; sites that read one tensor share λ and δ, as with ``share_input``."""
        random = np.random.default_rng(7)
        shared: dict[tuple[int, ...], Edit] = {}
        edits: dict[str, Edit] = {}
        for path, read in self.inputs.items():
            k = self.widths[path]
            if kind == "LoRFA r=4":
                a, b = random.standard_normal((4, k)) / np.sqrt(k), 0.05 * random.standard_normal((k, 4))
                edit = Edit(input_low_rank=LowRank(a.astype(np.float32), b.astype(np.float32), 2.0))
            elif read in shared:
                edit = shared[read]
            else:
                lam, delta = (0.2 * random.standard_normal(k).astype(np.float32) for _ in range(2))
                edit = shared[read] = Edit(lam=lam, delta=delta if kind == "VeFA + δ" else None)
            if path in self.sites:
                edits[path] = edit
        return Adapter("lorfa" if kind == "LoRFA r=4" else "vefa", edits)

    def torch(self, adapter: Adapter, dtype: torch.dtype) -> Array:
        """The output of the model with ``adapter`` unfolded, as float64."""
        model = attach(copy.deepcopy(self.model).to(dtype), adapter)
        if hasattr(model, "set_experts_implementation"):
            # the default multiplies all experts in one kernel, which has no float64
            model.set_experts_implementation("eager")
        with float64_throughout() if dtype is torch.float64 else contextlib.nullcontext():
            return _run(model, self.feeds, self.output, dtype)

    def onnxruntime(self, graph: ir.Model) -> Array:
        """The graph as it is written: what ONNX Runtime's fusions do to the error is ``verify``'s question."""
        model = ir.to_proto(graph).SerializeToString()
        runner = OnnxRuntimeRunner(model, threads=1, spinning=False, optimize=False)
        feeds = {spec.name: self.feeds[spec.name].numpy() for spec in runner.inputs}
        return runner.run(feeds)[self.output].astype(np.float64)

    def float64(self, graph: ir.Model) -> Array | None:
        """``None``, and the reason kept, where the numpy evaluator lacks an operator or gets it wrong."""
        if self.not_in_float64 is not None:
            return None
        try:
            return evaluate(graph, [{name: tensor.numpy() for name, tensor in self.feeds.items()}])[0][self.output]
        except Exception as error:  # its operators raise whatever numpy raises
            self.not_in_float64 = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            return None


def measure(name: str, *, adapters: Sequence[str] = ADAPTERS) -> Row:
    """Place each of ``adapters`` on architecture ``name`` in each of ``MODES``."""
    subject = Subject(ARCHITECTURES[name])
    return Row(
        architecture=name,
        model=type(subject.model).__name__,
        parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
        expected=len(subject.inputs),
        found=len(subject.sites),
        missing=sorted(set(subject.inputs) - subject.sites),
        adapters={kind: _measure(subject, subject.adapter(kind)) for kind in adapters},
        not_in_float64=subject.not_in_float64,
    )


def _measure(subject: Subject, adapter: Adapter) -> Measured:
    truth = subject.torch(adapter, torch.float64)
    base = subject.torch(Adapter(adapter.method, {}), torch.float64)
    noise = normwise(subject.torch(adapter, torch.float32), truth)
    plans = {mode: make_plan(subject.graph, adapter, **options) for mode, options in MODES.items()}
    modes: dict[str, Parity] = {}
    for mode, plan in plans.items():
        # two modes that place every edit alike are one graph
        same = next((done for done in modes if plans[done].edits == plan.edits), None)
        modes[mode] = modes[same] if same else _place(subject, adapter, plan, truth, noise)
    wrong = corrupted(adapter)
    broken = apply_adapter(subject.graph, wrong, make_plan(subject.graph, wrong))
    return Measured(
        noise=noise,
        effect=normwise(base, truth) / noise,
        corrupted=normwise(subject.onnxruntime(broken), truth) / noise,
        modes=modes,
    )


def _place(subject: Subject, adapter: Adapter, plan: Plan, truth: Array, noise: float) -> Parity:
    placed = apply_adapter(subject.graph, adapter, plan)
    exact = subject.float64(placed)
    failure, found = None, None
    try:
        found = subject.onnxruntime(placed)
    except DeployfaError as error:
        failure = str(error)
    return Parity(
        placements={kind: plan.count(kind) for kind in dict.fromkeys(edit.placement for edit in plan.edits)},
        reasons={edit.site: edit.reason for edit in plan.edits if edit.placement == SIDE_OP},
        onnxruntime=None if found is None else normwise(found, truth) / noise,
        float64=None if exact is None else normwise(exact, truth) / noise,
        failure=failure,
    )


def corrupted(adapter: Adapter) -> Adapter:
    """``adapter`` with the largest and the smallest number of λ swapped (LoRFA: two rows of B) in its middle edit."""
    sites = list(adapter.edits)
    path = sites[len(sites) // 2]
    edit = adapter.edits[path]
    low = edit.input_low_rank
    vector = edit.lam if low is None else low.b[:, 0]
    assert vector is not None  # every adapter here has one of the two
    order = np.arange(len(vector))
    first, last = int(np.argmin(vector)), int(np.argmax(vector))
    order[[first, last]] = last, first
    wrong = (
        Edit(lam=vector[order], delta=edit.delta)
        if low is None
        else Edit(input_low_rank=LowRank(low.a, low.b[order], low.s))
    )
    return Adapter(adapter.method, {**adapter.edits, path: wrong})


def _run(model: nn.Module, feeds: Mapping[str, torch.Tensor], output: str, dtype: torch.dtype) -> Array:
    given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in feeds.items()}
    with torch.inference_mode():
        found: Any = model(**given)
    tensor: torch.Tensor = found if isinstance(found, torch.Tensor) else found[output]
    return tensor.double().numpy()


def _inputs_of_layers(
    model: nn.Module, feeds: Mapping[str, torch.Tensor]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Layer → which tensors it reads, one for each call, and layer → k; only layers that run."""
    read: dict[str, tuple[int, ...]] = {}
    widths: dict[str, int] = {}
    kept: list[torch.Tensor] = []  # an id is one tensor's for as long as that tensor lives

    def watch(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            kept.append(args[0])
            read[path] = (*read.get(path, ()), id(args[0]))
            widths[path] = args[0].shape[1 if isinstance(module, nn.Conv1d | nn.Conv2d) else -1]

        return module.register_forward_pre_hook(hook)

    handles = [watch(path, module) for path, module in model.named_modules() if Architecture.is_layer(module)]
    with torch.inference_mode():
        model(**feeds)
    for handle in handles:
        handle.remove()
    return read, widths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for placements.json and placements.md")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, metavar="ARCHITECTURE", default=list(ARCHITECTURES))
    options = parser.parse_args(arguments)
    # onnx.reference computes the log of a zero for some masks, as the graph asks it to
    torch.set_num_threads(1)  # how PyTorch splits its sums over threads is part of its noise
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="onnx.reference")
    rows = []
    for name in options.only:
        row = measure(name)
        rows.append(row)
        errors = [parity.onnxruntime for each in row.adapters.values() for parity in each.modes.values()]
        worst = max(math.inf if error is None else error for error in errors)
        print(f"{name}: {row.found} of {row.expected} sites, error at most {worst:.2f}x float32 noise", file=sys.stderr)
    content = {"limit": LIMIT, "versions": installed(_PACKAGES), "rows": rows}
    with write_file(options.out / "placements.json", force=True) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    with write_file(options.out / "placements.md", force=True) as partial:
        partial.write_text(markdown(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
