"""The four forms of one adapter that ``gpu.py`` runs: their bundles, graphs in each precision, engines, PyTorch models.

Nothing here needs a GPU but ``build_engine`` with TensorRT proper.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_plan import FORMS
from many_adapters import DISTINCT, adapters

from deployfa.adapter import Adapter
from deployfa.bench import Shape
from deployfa.bundle import Bundle
from deployfa.compile import compile_bundle
from deployfa.data import Row
from deployfa.edits import Array, fold_matrix
from deployfa.graph.optimize import fuse
from deployfa.graph.storage import save_graph
from deployfa.lowered import lower, stored_judge
from deployfa.pack import pack
from deployfa.parity.cases import read_cases
from deployfa.pipeline import export
from deployfa.runtimes.onnx_adapter import read_onnx_adapter
from deployfa.runtimes.tensorrt import Sizes
from deployfa.runtimes.tensorrt.record import EngineRecord
from deployfa.slots import export_slots
from deployfa.unfused import unfused

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ADAPTER_IDS",
    "Form",
    "Graph",
    "build_engine",
    "feeds_of",
    "make_forms",
    "own_slots",
    "pytorch_model",
    "typed_graph",
]

ADAPTER_IDS = "adapter_ids"


@dataclass(frozen=True, eq=False)
class Form:
    """adapters: row of the table → the adapter there; of a bundle without tables, 0 → its own."""

    name: str
    bundle: Bundle
    adapters: Mapping[int, Adapter]


@dataclass(frozen=True, eq=False)
class Graph:
    """path: of an .onnx file; bound: inputs that every run gets the same arrays for."""

    path: Path
    bound: dict[str, Array]


def make_forms(
    folder: Path,
    method: str,
    *,
    forms: Sequence[str] = FORMS,
    distinct: int = DISTINCT,
    rows: Sequence[Row] | None = None,
    status: Callable[[str], None] | None = None,
) -> dict[str, Form]:
    """A bundle of each form below ``folder``, unfused: random values of a trained adapter's size, ``distinct`` of them
    in the mixed one.  rows: of the stored reference, deployfa's built-in sentences if none."""
    own = adapters(method, distinct)
    first = next(iter(own.values()))
    common: dict[str, Any] = {"optimize": "none", "rows": rows, "status": status}
    made: dict[str, Form] = {}
    for form in forms:
        out = folder / form.replace(" ", "-")
        if form == "mixed":
            bundle = pack(own, out, table_inputs=True, **common).bundle
        elif form == "slots":
            # an idle branch would be a second model in the engine, which the swap does not need
            bundle = export_slots(first, out, idle_branch=False, **common).bundle
        else:
            bundle = export(first, out, placement="side-op" if form == "side op" else "fold", **common).bundle
        made[form] = Form(form, bundle, dict(enumerate(own.values(), start=1)) if form == "mixed" else {0: first})
    return made


def typed_graph(form: Form, precision: str, folder: Path, *, fusion: str = "none") -> Graph:
    """What ONNX Runtime runs: the bundle's graph in ``precision``, fused or not.

    Raises what ``deployfa.lowered.lower`` and ``deployfa.graph.optimize.fuse`` raise.
    """
    plain = unfused(form.bundle)
    for number, node in enumerate(plain.model.graph):
        node.name = node.name or f"{node.op_type}_{number}"
    bound = {**plain.defaults, **own_slots(form.bundle)}
    bound = {name: bound[name] for name in plain.defaults}
    model = lower(
        plain.model,
        precision,
        stored_judge(read_cases(form.bundle.reference), bound, form.bundle.manifest.reference.noise),
    ).model
    folder.mkdir(parents=True)
    return Graph(save_graph(fuse(model, fusion), folder), bound)


def build_engine(
    form: Form,
    target: str,
    precision: str,
    shapes: Sequence[Shape],
    capability: str | None,
    *,
    status: Callable[[str], None] | None = None,
) -> EngineRecord:
    """An engine in the bundle of ``form`` for all of ``shapes``, tuned for the largest.

    capability: of the GPU, which TensorRT-RTX builds for; ``None`` for all that it knows.  Raises ``DeployfaError``
    with the library's own words where it does not build for it.
    """
    batch, sequence = ([getattr(shape, axis) for shape in shapes] for axis in ("batch", "sequence"))
    profile = {
        "batch": Sizes(min(batch), max(batch), max(batch)),
        "sequence": Sizes(min(sequence), max(sequence), max(sequence)),
    }
    ahead = target == "tensorrt-rtx" and capability is not None
    return compile_bundle(
        form.bundle,
        target,
        precision=precision,
        profile=profile,
        compute_capabilities=[capability] if ahead and capability else [],
        force=True,
        status=status,
    ).engine


def pytorch_model(adapter: Adapter, form: str, precision: str, device: str) -> nn.Module:
    """MiniLM with ``adapter`` in PyTorch: ``folded`` into the weights, else beside its layers, by hooks."""
    import torch

    from deployfa.training.base import load_base_of
    from deployfa.training.reference import attach

    dtype = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model = copy.deepcopy(load_base_of(adapter, adapter.base.name).model).eval()
    model.requires_grad_(False)
    if form == "folded":
        attach(model, adapter, edits=False)
        modules: dict[str, Any] = dict(model.named_modules())
        for site, edit in adapter.edits.items():
            layer = modules[site]
            weight, bias = fold_matrix(edit, layer.weight.numpy(), layer.bias.numpy())
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
        return model.to(device, dtype)
    return attach(model.to(device, dtype), adapter)


def feeds_of(form: Form, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """``feeds`` of texts, and for a mixed batch which row runs which adapter: as many different ones as there are."""
    if form.name != "mixed":
        return dict(feeds)
    rows = len(next(iter(feeds.values())))
    return {**feeds, ADAPTER_IDS: np.resize(np.array(list(form.adapters), np.int64), rows)}


def own_slots(bundle: Bundle) -> dict[str, Array]:
    """The adapter that a bundle with slots came with, as inputs; of any other bundle nothing."""
    slots = bundle.manifest.slots
    if slots is None:
        return {}
    return read_onnx_adapter(bundle.path / slots.file, slots.layout, idle_branch=slots.idle_branch)
