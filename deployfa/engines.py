"""Open an engine of a bundle: hash first, then version and GPU, then its adapter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deployfa.bundle import Bundle
from deployfa.bundle.engines import engine_of, read_engine
from deployfa.cache import cache_dir
from deployfa.edits import Array
from deployfa.errors import InputError
from deployfa.graph.row_defaults import default_strength
from deployfa.runtimes.onnx_adapter import read_onnx_adapter
from deployfa.runtimes.tensorrt.record import EngineRecord
from deployfa.runtimes.tensorrt.runner import EngineRunner

__all__ = ["engine_defaults", "open_engine"]


def open_engine(
    bundle: Bundle, target: str, *, name: str | None = None, device: int = 0, cuda_graphs: bool = False
) -> EngineRunner:
    """The engine of ``bundle`` for ``target`` on GPU ``device``, its slots filled with the bundle's own adapter and its
    tables with the pack's.

    ``bind`` of the runner puts another adapter there: a copy of kilobytes, no refit, no rebuild.  Raises what
    ``read_engine`` and ``EngineRunner`` raise, and ``InputError`` for a bundle with a patch.
    """
    if bundle.patch is not None:
        raise InputError("an engine takes no patch; compile the adapter's own bundle, or one exported with --slots")
    record = engine_of(bundle, target, name)
    plan = read_engine(bundle, record)
    return EngineRunner(
        plan,
        record,
        device=device,
        cuda_graphs=cuda_graphs,
        bound=engine_defaults(bundle, record),
        runtime_cache=cache_dir() / "runtime-kernels" / f"{record.sha256[:16]}.cache",
    )


def engine_defaults(bundle: Bundle, record: EngineRecord) -> dict[str, Array]:
    """What the optional inputs of an engine hold until somebody says otherwise: name → array."""
    slots = bundle.manifest.slots
    known: dict[str, Array] = {**default_strength()}
    if slots is not None:
        known |= read_onnx_adapter(bundle.path / slots.file, slots.layout, idle_branch=slots.idle_branch)
    tables: Mapping[str, Array] = bundle.bound
    known |= {name: np.ascontiguousarray(array) for name, array in tables.items()}
    return {name: known[name] for name in record.optional}
