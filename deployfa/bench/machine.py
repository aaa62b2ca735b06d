"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import msgspec

from deployfa.versions import installed

__all__ = ["Machine", "available_cores", "describe_machine"]

_PACKAGES = ("deployfa", "numpy", "onnxruntime", "onnxruntime-gpu", "torch")
#: Share of the processors above which the figures are someone else's as much as ours.
_BUSY = 0.1
_WATCH_S = 0.5


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """cores: those this process may use.  load_1min: the system's load average before the first worker started; it
    remembers a minute, so a quiet machine that was busy just now shows one.  busy_share: the part of all processors'
    time that was used in half a second before the first worker started, in [0, 1].  Both ``None`` where unknown.
    versions: of installed packages, from their metadata.
    """

    cpu: str
    cores: int
    system: str
    python: str
    load_1min: float | None
    busy_share: float | None
    versions: dict[str, str]

    @property
    def busy(self) -> bool:
        return self.busy_share is not None and self.busy_share > _BUSY


def describe_machine() -> Machine:
    """Read the machine as it is now."""
    return Machine(
        cpu=_cpu_name(),
        cores=available_cores(),
        system=platform.platform(),
        python=platform.python_version(),
        load_1min=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        busy_share=_busy_share(),
        versions=installed(_PACKAGES),
    )


def available_cores() -> int:
    """Cores that the scheduler lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _busy_share() -> float | None:
    """Watch all processors for half a second (Linux: the first line of /proc/stat; jiffies, 4th idle, 5th iowait)."""

    def read() -> tuple[int, int]:
        words = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
        ticks = [int(word) for word in words]
        return sum(ticks), ticks[3] + ticks[4]

    try:
        total, idle = read()
        time.sleep(_WATCH_S)
        later_total, later_idle = read()
    except (OSError, ValueError, IndexError):
        return None
    passed = later_total - total
    return round(1 - (later_idle - idle) / passed, 3) if passed > 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
