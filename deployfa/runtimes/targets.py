"""Every target by name and what opens a graph on it: the one place where a runtime is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deployfa.edits import Array
from deployfa.errors import InputError, RuntimeTargetError
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.providers import PROVIDERS
from deployfa.runtimes.runner import Runner, Spinning
from deployfa.runtimes.tensorrt.library import LIBRARIES

__all__ = ["DEFAULT_TARGET", "TARGETS", "check_target", "is_engine", "open_onnxruntime", "open_runner"]

DEFAULT_TARGET = "onnxruntime-cpu"


def open_onnxruntime(target: str, graph: Path | bytes, **options: Any) -> OnnxRuntimeRunner:
    """``open_runner`` for what only ONNX Runtime can do: tables that are bound, adapters that are added to a run.

    Raises ``RuntimeTargetError`` for a target of another runtime.
    """
    check_target(target)
    if target not in PROVIDERS:
        raise RuntimeTargetError(f"this runs in ONNX Runtime, which {target} is not; pick from: {', '.join(PROVIDERS)}")
    return OnnxRuntimeRunner(graph, provider=PROVIDERS[target].name, **options)


_OPENERS: Mapping[str, Callable[..., Runner]] = {
    "onnxruntime-cpu": open_onnxruntime,
    "onnxruntime-cuda": open_onnxruntime,
    "onnxruntime-tensorrt": open_onnxruntime,
    "onnxruntime-tensorrt-rtx": open_onnxruntime,
}
#: Those of TensorRT run an engine, which is a bundle's: ``deployfa.bundle.open_engine``.
TARGETS = (*_OPENERS, *LIBRARIES)


def is_engine(target: str) -> bool:
    """Whether ``target`` runs a compiled engine, and no graph."""
    return target in LIBRARIES


def check_target(target: str) -> None:
    """Raise ``InputError`` unless there is such a target."""
    if target not in TARGETS:
        raise InputError(f"no target '{target}'; targets: {', '.join(TARGETS)}")


def open_runner(
    target: str,
    graph: Path | bytes,
    *,
    threads: int | None = None,
    spinning: Spinning = True,
    optimize: bool = True,
    initializers: Mapping[str, Array] | None = None,
    bound: Mapping[str, Array] | None = None,
) -> Runner:
    """A ``Runner`` of ``graph`` on ``target``, or an error: never another target.

    The options are those of ``OnnxRuntimeRunner``.  Raises ``InputError`` for an unknown target, and what the target's
    own runner raises.
    """
    check_target(target)
    if is_engine(target):
        raise RuntimeTargetError(f"{target} runs engines, not graphs; make one of a bundle: deployfa compile BUNDLE")
    return _OPENERS[target](
        target,
        graph,
        threads=threads,
        spinning=spinning,
        optimize=optimize,
        initializers=initializers,
        bound=bound,
    )
