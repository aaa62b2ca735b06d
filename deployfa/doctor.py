"""What this machine has, which targets can be built and run here, and for each "no" the reason and the way out.

Nothing is guessed from names of packages: every library is loaded and every target runs a graph, each in a process of
its own (``deployfa.runtimes.probe``), so that one that crashes is reported like one that is missing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from deployfa.errors import InputError
from deployfa.runtimes.probe import DEVICES, LIBRARY, RUNTIME, Device, Found, probe
from deployfa.runtimes.providers import PROVIDERS
from deployfa.runtimes.targets import TARGETS
from deployfa.runtimes.tensorrt import LIBRARIES
from deployfa.versions import installed

__all__ = ["Answer", "DoctorReport", "RuntimeState", "TargetState", "examine", "known_targets"]

_PACKAGES = (
    "deployfa",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13-bindings",
    "cuda-bindings",
    "nvidia-cudnn-cu13",
    "tokenizers",
    "torch",
    "transformers",
    "onnxscript",
    "peft",
)
#: Making a base graph, the first step of every bundle, needs these; later steps do not.
_EXPORTER = ("torch", "transformers", "onnxscript", "peft")
_ORT = ("onnxruntime", "onnxruntime-gpu")
#: target → the packages that it needs, of each tuple one.  Where all are there, no pip command helps.
_NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "onnxruntime-cpu": (_ORT,),
    "onnxruntime-cuda": (("onnxruntime-gpu",), ("nvidia-cudnn-cu13",)),
    "onnxruntime-tensorrt": (("onnxruntime-gpu",), ("nvidia-cudnn-cu13",), ("tensorrt-cu13",)),
    "onnxruntime-tensorrt-rtx": (_ORT, ("onnxruntime-ep-nv-tensorrt-rtx-cu13",)),
    "tensorrt": (("tensorrt-cu13",), ("cuda-bindings",)),
    "tensorrt-rtx": (
        ("tensorrt-rtx-cu13-bindings",),
        ("onnxruntime-ep-nv-tensorrt-rtx-cu13",),
        ("cuda-bindings",),
    ),
}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """``yes``, or the reason why not and, where installing something helps, the command that does it."""

    yes: bool
    reason: str | None = None
    install: str | None = None


class TargetState(msgspec.Struct, frozen=True, kw_only=True):
    """build: whether a bundle (``onnxruntime-…``) or an engine can be made for it here.  run: whether it runs here."""

    target: str
    build: Answer
    run: Answer


class RuntimeState(msgspec.Struct, frozen=True, kw_only=True):
    """A library that was loaded, or why it was not.  providers: ONNX Runtime's own, as it names them.
    compute_capabilities: those that engines can be built for without a GPU."""

    name: str
    version: str | None
    import_ms: float | None
    reason: str | None
    providers: list[str]
    compute_capabilities: list[str]


class DoctorReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``doctor --json``.  no_devices: why no GPU was found.  driver, cuda: their versions."""

    system: str
    machine: str
    python: str
    cores: int | None
    versions: dict[str, str]
    runtimes: list[RuntimeState]
    devices: list[Device]
    no_devices: str | None
    driver: str | None
    cuda: str | None
    targets: list[TargetState]


def known_targets() -> tuple[str, ...]:
    """Every target that there is, whether it can be had here or not."""
    return tuple(dict.fromkeys((*TARGETS, *LIBRARIES)))


def examine(
    targets: Sequence[str] = (), *, ask: Callable[[str], Found] = probe, status: Callable[[str], None] | None = None
) -> DoctorReport:
    """Try everything, or what ``targets`` need.  Raises ``InputError`` for a target that there is not.

    ``ask`` runs one probe.
    """
    say = status or (lambda _: None)
    for target in targets:
        if target not in known_targets():
            raise InputError(f"no target '{target}'; targets: {', '.join(known_targets())}")
    chosen = tuple(targets) or known_targets()
    libraries = [target for target in LIBRARIES if not targets or target in targets]
    names = [DEVICES, RUNTIME, *(f"{LIBRARY}{target}" for target in libraries)]
    names += [target for target in chosen if target in PROVIDERS]
    say(f"trying {len(names)} things, each in a process of its own")
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip(names, pool.map(ask, names), strict=True))
    versions = installed(_PACKAGES)
    devices = found[DEVICES]
    runtimes = [_runtime("onnxruntime", found[RUNTIME])]
    runtimes += [_runtime(target, found[f"{LIBRARY}{target}"]) for target in libraries]
    return DoctorReport(
        system=platform.platform(),
        machine=platform.machine(),
        python=platform.python_version(),
        cores=os.cpu_count(),
        versions=versions,
        runtimes=runtimes,
        devices=devices.devices,
        no_devices=devices.reason,
        driver=devices.driver,
        cuda=devices.cuda,
        targets=[
            _provider_state(target, found, versions)
            if target in PROVIDERS
            else _engine_state(target, found[f"{LIBRARY}{target}"], devices, versions)
            for target in chosen
        ],
    )


def _runtime(name: str, found: Found) -> RuntimeState:
    return RuntimeState(
        name=name,
        version=found.version,
        import_ms=None if found.import_ms is None else round(found.import_ms, 1),
        reason=None if found.reason is None else _why(found.reason),
        providers=found.providers,
        compute_capabilities=found.compute_capabilities,
    )


def _provider_state(target: str, found: Mapping[str, Found], versions: Mapping[str, str]) -> TargetState:
    """A bundle for any provider is made, and checked, on the CPU; it runs where a graph ran."""
    run = found[target]
    return TargetState(
        target=target,
        build=_exports(found[RUNTIME], versions),
        run=Answer(yes=True) if run.ok else _no(run.reason, _install(target, versions)),
    )


def _exports(runtime: Found, versions: Mapping[str, str]) -> Answer:
    lacking = [package for package in _EXPORTER if package not in versions]
    if not runtime.ok:
        return _no(runtime.reason, "pip install 'deployfa[cpu,train]'")
    if lacking:
        reason = f"base graphs that are not in the cache need {', '.join(lacking)}"
        return Answer(yes=False, reason=reason, install="pip install 'deployfa[train]'")
    return Answer(yes=True)


def _engine_state(target: str, library: Found, devices: Found, versions: Mapping[str, str]) -> TargetState:
    """An engine is built where the library loads (TensorRT: on the GPU it is for), and runs on a GPU that it knows."""
    install = _install(target, versions)
    if not library.ok:
        no = _no(library.reason, install)
        return TargetState(target=target, build=no, run=no)
    ahead = library.compute_capabilities
    build = Answer(yes=True) if ahead or devices.ok else _no(devices.reason, None)
    run = Answer(yes=True)
    if "cuda-bindings" not in versions:
        run = _no("cuda-bindings, by which engines get their memory, is not installed", install)
    elif not devices.ok:
        run = _no(devices.reason, None)
    elif ahead and not {device.compute_capability for device in devices.devices} & set(ahead):
        there = ", ".join(f"{device.name} has {device.compute_capability}" for device in devices.devices)
        run = _no(f"{target} {library.version} runs on compute capability {', '.join(ahead)}, and {there}", None)
    return TargetState(target=target, build=build, run=run)


def _install(target: str, versions: Mapping[str, str]) -> str | None:
    """The command that brings what is missing; ``None`` where nothing is."""
    if all(any(package in versions for package in one_of) for one_of in _NEEDS[target]):
        return None
    if target not in PROVIDERS:
        return f"pip install 'deployfa[{target}]'"
    command = f"pip install {PROVIDERS[target].install}"
    # the two are one module: the later one would overwrite half of the earlier one
    swap = ("onnxruntime-gpu",) in _NEEDS[target] and "onnxruntime" in versions
    return f"pip uninstall -y onnxruntime && {command}" if swap else command


def _no(reason: str | None, install: str | None) -> Answer:
    return Answer(yes=False, reason=_why(reason or "unknown"), install=install)


def _why(message: str) -> str:
    """An error's first part says what is wrong; the second, what to do, is said here by ``install``."""
    return message.split("; run: ")[0].removesuffix(", or pick the target onnxruntime-cpu")
