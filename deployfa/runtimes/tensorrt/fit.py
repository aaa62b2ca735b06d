"""Whether an engine fits the library and the GPU at hand.  It is machine code: nearly right is wrong."""

from __future__ import annotations

from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.tensorrt.record import EngineRecord

__all__ = ["check_device", "check_version"]


def check_version(record: EngineRecord, version: str) -> None:
    """Raise ``RuntimeTargetError`` unless ``version`` of the library is the one that built the engine."""
    if version != record.library_version:
        raise RuntimeTargetError(
            f"engine {record.name} was built by {record.target} {record.library_version}, here is {version}; "
            f"build it again: {record.command}"
        )


def check_device(record: EngineRecord, name: str, capability: str) -> None:
    """Raise ``RuntimeTargetError`` unless the engine was built for GPUs like ``name``."""
    if record.compute_capabilities and capability not in record.compute_capabilities:
        raise RuntimeTargetError(
            f"engine {record.name} was built for compute capability {', '.join(record.compute_capabilities)}, and "
            f"{name} has {capability}; build it again: {record.command} --compute-capability {capability}"
        )
