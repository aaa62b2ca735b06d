"""The GPU that figures are of: its name, driver, clocks, memory, and who else uses it."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import msgspec

from deployfa.bench.machine import describe_machine
from deployfa.runtimes.probe import Found
from deployfa.runtimes.tensorrt.device import Device
from deployfa.versions import installed

__all__ = ["describe", "parse_smi", "smi"]

#: ``nvidia-smi``'s names of what is asked of a GPU; a driver that lacks one is asked for the others.
FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "utilization.gpu",
    "temperature.gpu",
    "power.limit",
    "persistence_mode",
    "compute_mode",
    "mig.mode.current",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks_event_reasons.active",
)
_PACKAGES = (
    "deployfa",
    "numpy",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt",
    "tensorrt-cu13",
    "cuda-bindings",
)


def describe(devices: Found, device: Device) -> dict[str, Any]:
    """The host as ``deployfa.bench`` describes it, and ``gpu``; devices: of the probe of that name."""
    machine: dict[str, Any] = msgspec.to_builtins(describe_machine())
    machine["versions"] = installed(_PACKAGES)
    machine["gpu"] = {
        "name": device.name,
        "compute_capability": device.capability,
        "memory_bytes": devices.devices[device.number].memory_bytes,
        "driver": devices.driver,
        "cuda_of_driver": devices.cuda,
        "before": smi(device),
    }
    return machine


def parse_smi(fields: tuple[str, ...], line: str) -> dict[str, str | None]:
    """One line of ``--format=csv,noheader``; what the GPU does not tell is ``None``."""
    values = [part.strip() for part in line.split(",")]
    if len(values) != len(fields):
        return {}
    return {
        name: None if value.strip("[]") in {"N/A", "Not Supported", "Unknown Error"} else value
        for name, value in zip(fields, values, strict=True)
    }


def smi(device: Device) -> dict[str, str | None]:
    """``FIELDS`` of ``device`` now; empty without ``nvidia-smi``."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    # it counts the machine's GPUs, CUDA those that this process may see
    bus = device.call(device.runtime.cudaDeviceGetPCIBusId, 32, device.number)
    number = bus.decode().rstrip("\0")
    found: dict[str, str | None] = {}
    # one at a time: a field that the driver does not know spoils the whole query
    for name in FIELDS:
        command = [program, f"--id={number}", f"--query-gpu={name}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            found |= parse_smi((name,), done.stdout.strip())
    return found
