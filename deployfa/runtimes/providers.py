"""ONNX Runtime's providers as targets: what each is called, what brings it, and how a session asks for it.

A provider that is compiled into the installed onnxruntime is asked for by name.  A plug-in is a library of its own: it
is registered once a process, offers devices, and a session is given one of them; ``providers=[...]`` knows none.

Sources: https://onnxruntime.ai/docs/execution-providers/ and
https://onnxruntime.ai/docs/execution-providers/plugin-ep-libraries/usage.html
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployfa.errors import MissingExtraError, RuntimeTargetError

__all__ = ["CPU", "PROVIDERS", "Asked", "Provider", "attach", "provider_of"]

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Provider:
    """name: ONNX Runtime's.  install: what pip is given.  options: given to every session.  plugin: the module that
    carries the library, of a plug-in.  preload: a module whose import loads libraries that this one is linked against.
    needs: the machine, in words."""

    name: str
    install: str
    options: Mapping[str, str] = field(default_factory=dict)
    plugin: str | None = None
    preload: str | None = None
    needs: str = "nothing else"


#: target → provider.  None of them stands in for another: TensorRT's does not fall back to CUDA's.  What NVIDIA's need
#: is what the libraries of onnxruntime-gpu 1.31.1 and of the plug-in 0.5.0 are linked against.
PROVIDERS: Mapping[str, Provider] = {
    "onnxruntime-cpu": Provider(CPU, "'deployfa[cpu]'"),
    "onnxruntime-cuda": Provider(
        "CUDAExecutionProvider",
        "'deployfa[gpu]' 'onnxruntime-gpu[cuda,cudnn]'",
        # TF32, its default, rounds what float32 products multiply to 10 bits: no float32 parity would hold
        options={"use_tf32": "0"},
        needs="an NVIDIA GPU, its driver, CUDA 13 and cuDNN 9",
    ),
    "onnxruntime-tensorrt": Provider(
        "TensorrtExecutionProvider",
        "'deployfa[gpu]' 'onnxruntime-gpu[cuda,cudnn]' 'tensorrt-cu13<11'",
        preload="tensorrt",
        needs="an NVIDIA GPU, its driver, CUDA 13, cuDNN 9 and TensorRT 10",
    ),
    "onnxruntime-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "'deployfa[cpu,tensorrt-rtx]'",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        needs="an NVIDIA GPU of compute capability 8.6, 8.9 or 12.x and its driver",
    ),
}


@dataclass(frozen=True)
class Asked:
    """arguments: what ``InferenceSession`` needs besides the options.  missing: libraries that the provider may need
    and that no loader finds."""

    arguments: Mapping[str, Any]
    missing: tuple[str, ...] = ()


def provider_of(name: str) -> tuple[str, Provider] | None:
    """The target and what is known of the provider that ONNX Runtime calls ``name``."""
    return next(((target, each) for target, each in PROVIDERS.items() if each.name == name), None)


def attach(ort: Any, options: Any, name: str, given: Mapping[str, str] | None = None) -> Asked:
    """Ask for provider ``name`` and no other; ``given``: options of its own, besides those that it always gets.

    Raises ``MissingExtraError`` for a plug-in that is not installed, and ``RuntimeTargetError`` for a provider that is
    not in this onnxruntime or whose library does not load, and where there is no device for it.
    """
    target, known = provider_of(name) or ("", Provider(name, ""))
    chosen = {**known.options, **(given or {})}
    if known.plugin is not None:
        _register(target)
    elif name in ort.get_available_providers():
        missing = _preload(ort, known) if name != CPU else ()
        return Asked({"providers": [name], "provider_options": [chosen], "enable_fallback": 0}, missing)
    # some builds of onnxruntime-gpu carry CUDA's provider as a plug-in, which they register themselves
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if devices:
        options.add_provider_for_devices(devices[:1], chosen)
        return Asked({"enable_fallback": 0})
    if known.plugin is not None:
        raise RuntimeTargetError(
            f"{name} finds no device here; {target} needs {known.needs}: look at deployfa doctor, or pick the target "
            "onnxruntime-cpu"
        )
    available = ", ".join(ort.get_available_providers())
    way_out = f"; run: pip install {known.install}, or pick the target onnxruntime-cpu" if target else ""
    raise RuntimeTargetError(f"provider '{name}' is not in this onnxruntime; available: {available}{way_out}")


@functools.cache
def _register(target: str) -> None:
    """Load a plug-in's library into ONNX Runtime, once a process; a failure is not remembered."""
    provider = PROVIDERS[target]
    assert provider.plugin is not None
    try:
        module = importlib.import_module(provider.plugin)
    except ModuleNotFoundError as error:
        raise MissingExtraError(provider.plugin, "cpu,tensorrt-rtx", f"the target {target}") from error
    import onnxruntime as ort

    try:
        ort.register_execution_provider_library(provider.name, module.get_library_path())
    except Exception as error:  # its exceptions share no base class
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeTargetError(
            f"the library of {provider.name} does not load ({text.rpartition('with error: ')[2]}); {target} needs "
            f"{provider.needs}: install what is missing, or pick the target onnxruntime-cpu"
        ) from error


def _preload(ort: Any, provider: Provider) -> tuple[str, ...]:
    """Load what lies in NVIDIA's wheels, where no loader looks; returns the libraries that were not found."""
    if provider.preload is not None:
        # a session says what is wrong with it, if anything is
        with contextlib.suppress(Exception):
            importlib.import_module(provider.preload)
    # it prints what it does not find, and our output may be JSON
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ort.preload_dlls()
    return tuple(re.findall(r"Failed to load (\S+):", said.getvalue()))
