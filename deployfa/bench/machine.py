"""What the numbers were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import msgspec

__all__ = ["Machine", "available_cores", "describe_machine"]

_PACKAGES = ("deployfa", "numpy", "onnxruntime", "onnxruntime-gpu", "torch")
_BUSY = 0.5  # load a core above which the figures are someone else's as much as ours


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """cores: those this process may use.  load_1min: the system's load average before the first worker started,
    ``None`` where there is none.  versions: of installed packages, from their metadata.
    """

    cpu: str
    cores: int
    system: str
    python: str
    load_1min: float | None
    versions: dict[str, str]

    @property
    def busy(self) -> bool:
        return self.load_1min is not None and self.load_1min > _BUSY * self.cores


def describe_machine() -> Machine:
    """Read the machine as it is now."""
    return Machine(
        cpu=_cpu_name(),
        cores=available_cores(),
        system=platform.platform(),
        python=platform.python_version(),
        load_1min=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        versions=_versions(),
    )


def available_cores() -> int:
    """Cores that the scheduler lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
