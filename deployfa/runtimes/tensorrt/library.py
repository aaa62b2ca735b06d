"""NVIDIA's two libraries behind one name: ``tensorrt`` and ``tensorrt_rtx``, whose Python APIs are the same.

TensorRT for RTX comes without a Python package of its libraries: they lie in the wheel of ONNX Runtime's plug-in, which
loads them when it is imported, and its bindings then find them.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/ and https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from deployfa.errors import MissingExtraError, RuntimeTargetError

__all__ = ["LIBRARIES", "Library", "check_installed", "load_library"]

#: The oldest of each that this was written for: (major, minor).
_OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 2)}
#: target → the modules to import, in this order; the last one is the API
_MODULES = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings"),
}
LIBRARIES = tuple(_MODULES)


@dataclass(frozen=True, eq=False)
class Library:
    """One of the two, imported.

    target: as on the command line.  api: the module.  compute_capabilities: those it can be asked to build for, as
    NVIDIA writes them (``8.9``); empty where an engine is built for the GPU at hand only.
    """

    target: str
    version: str
    api: Any
    compute_capabilities: tuple[str, ...]

    @property
    def rtx(self) -> bool:
        return self.target == "tensorrt-rtx"

    @property
    def builds_without_gpu(self) -> bool:
        """TensorRT times its kernels on the GPU that it builds for; TensorRT for RTX compiles ahead of time."""
        return bool(self.compute_capabilities)

    def capability(self, name: str) -> Any:
        """The library's own name for compute capability ``8.9``.  Raises ``RuntimeTargetError`` if it has none."""
        if name not in self.compute_capabilities:
            known = ", ".join(self.compute_capabilities) or "none but that of the GPU at hand"
            raise RuntimeTargetError(
                f"{self.target} {self.version} does not build for compute capability {name}; pick from: {known}"
            )
        return getattr(self.api.ComputeCapability, f"SM{name.replace('.', '')}")


def check_installed(target: str) -> None:
    """Raise ``MissingExtraError``, without importing anything, if what ``target`` needs is not here."""
    for name in _MODULES[target]:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, target, f"the target {target}")


def load_library(target: str) -> Library:
    """Import what ``target`` needs, which takes a second or more.

    Raises ``MissingExtraError`` when it is not installed, and ``RuntimeTargetError`` when it is too old or its own
    libraries do not load.
    """
    check_installed(target)
    for name in _MODULES[target]:
        try:
            api = importlib.import_module(name)
        except Exception as error:  # each loader fails in its own way: OSError, RuntimeError, ImportError
            raise RuntimeTargetError(
                f"{name} is installed but does not load ({_first_line(error)}); install deployfa[{target}] again"
            ) from error
    version = str(api.__version__)
    oldest = _OLDEST[target]
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        wanted = ".".join(map(str, oldest))
        raise RuntimeTargetError(f"{target} is {version}; deployfa needs {wanted}: pip install -U 'deployfa[{target}]'")
    return Library(target, version, api, _compute_capabilities(api))


def _compute_capabilities(api: Any) -> tuple[str, ...]:
    """``SM89`` → ``8.9``, ``SM120`` → ``12.0``, in order of size."""
    known = getattr(api, "ComputeCapability", None)
    numbers = sorted(int(name[2:]) for name in dir(known) if name.startswith("SM") and name[2:].isdigit())
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
