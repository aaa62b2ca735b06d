"""Who takes part in ``gpu.py``, and who does not and why: decided from what is installed, before anything is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployfa.lowered import PRECISIONS as TYPED
from deployfa.runtimes.probe import DEVICES, LIBRARY, Found, probe

__all__ = [
    "FORMS",
    "PRECISIONS",
    "PROBED",
    "SYSTEMS",
    "Planned",
    "make_plan",
    "probe_all",
    "torch_on_gpu",
    "what_is_missing",
]

#: An adapter's four ways to be in a model.  The first is what the others are held against.
FORMS = ("folded", "side op", "slots", "mixed")
PRECISIONS = ("fp32", "fp16", "bf16")
#: System → kind, and the target that it is of.
SYSTEMS: dict[str, tuple[str, str]] = {
    "PyTorch eager": ("torch", "eager"),
    "torch.compile": ("torch", "default"),
    "torch.compile, CUDA graphs": ("torch", "reduce-overhead"),
    "ONNX Runtime CUDA": ("onnxruntime", "onnxruntime-cuda"),
    "ONNX Runtime CUDA, fused": ("onnxruntime fused", "onnxruntime-cuda"),
    "ONNX Runtime TensorRT": ("onnxruntime", "onnxruntime-tensorrt"),
    "ONNX Runtime TensorRT-RTX": ("onnxruntime", "onnxruntime-tensorrt-rtx"),
    "TensorRT": ("engine", "tensorrt"),
    "TensorRT, CUDA graphs": ("engine graphs", "tensorrt"),
    "TensorRT-RTX": ("engine", "tensorrt-rtx"),
    "TensorRT-RTX, CUDA graphs": ("engine graphs", "tensorrt-rtx"),
}
#: What is asked about before the plan: the GPU, targets on which a graph is run, libraries that build engines.
PROBED = (
    DEVICES,
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-tensorrt-rtx",
    f"{LIBRARY}tensorrt",
    f"{LIBRARY}tensorrt-rtx",
)
_NO_FORM = {
    "slots": "in PyTorch a slot is a side op, which is measured",
    "mixed": "PyTorch and PEFT have no batch that mixes VeFA or LoRFA adapters (PEFT's mixed batches are of LoRA)",
}


@dataclass(frozen=True)
class Planned:
    """One contender.  why_not: the reason if it will not be run."""

    system: str
    form: str
    precision: str
    why_not: str | None = None

    @property
    def label(self) -> str:
        return f"{self.system}, {self.form}, {self.precision}"

    @property
    def kind(self) -> str:
        return SYSTEMS[self.system][0]

    @property
    def target(self) -> str:
        return SYSTEMS[self.system][1]


def probe_all() -> dict[str, Found]:
    """Every probe of ``PROBED``, each in a process of its own."""
    return {name: probe(name) for name in PROBED}


def make_plan(found: Mapping[str, Found]) -> list[Planned]:
    """Every system in every form and precision, those that cannot run with their reason; found: of ``probe_all``."""
    torch = torch_on_gpu()
    return [
        Planned(system, form, precision, _why_not(system, form, precision, found, torch))
        for precision in PRECISIONS
        for system in SYSTEMS
        for form in FORMS
    ]


def what_is_missing(devices: Found) -> str | None:
    """Why nothing can be measured here at all, in one line that says what to do; ``None`` if something can.

    devices: what the probe of that name found.
    """
    wanted = []
    if not devices.ok:
        wanted.append(devices.reason or "no NVIDIA GPU found")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        wanted.append("cuda-bindings, which reads the GPU's clock, is not installed (pip install cuda-bindings)")
    if not wanted:
        return None
    way_out = "run this on a machine with an NVIDIA GPU and its driver" if not devices.ok else "install it"
    torch = torch_on_gpu().get("why_not")
    return "; ".join([*wanted, *([torch] if torch else []), way_out])


def _why_not(
    system: str, form: str, precision: str, found: Mapping[str, Found], torch: Mapping[str, Any]
) -> str | None:
    kind, target = SYSTEMS[system]
    if kind == "torch":
        if form in _NO_FORM:
            return _NO_FORM[form]
        if torch.get("why_not"):
            return str(torch["why_not"])
        if precision == "bf16" and not torch["bf16"]:
            return "this GPU does not compute in bfloat16"
        if target != "eager" and importlib.util.find_spec("triton") is None:
            return "triton is not installed, with which torch.compile makes kernels"
        return None
    if precision not in TYPED:
        return f"deployfa types no graph in {precision} yet"
    name = f"{LIBRARY}{target}" if kind.startswith("engine") else target
    return None if found[name].ok else found[name].reason


def torch_on_gpu() -> dict[str, Any]:
    """``why_not``: why PyTorch cannot use a GPU here; ``bf16``: whether the GPU computes in it."""
    try:
        import torch
    except ModuleNotFoundError:
        return {"why_not": "PyTorch is not installed (pip install 'deployfa[train]')"}
    if torch.version.cuda is None:
        return {"why_not": f"PyTorch {torch.__version__} is built for the CPU only"}
    if not torch.cuda.is_available():
        return {"why_not": f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU"}
    return {"bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
