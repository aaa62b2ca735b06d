"""What is known of an engine without loading it."""

from __future__ import annotations

import msgspec

from deployfa.runtimes.runner import TensorSpec
from deployfa.runtimes.tensorrt.profiles import Sizes

__all__ = ["EngineRecord"]


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of a bundle.

    name: as ``--engine`` takes it, ``TARGET-PRECISION``.  file: in the bundle; sha256: of it, without which it is never
    loaded.  compute_capabilities: the GPUs it runs on; empty for the one it was built on.  profile: dynamic dimension →
    sizes.  inputs, outputs: its signature.  optional: inputs that have a default in the bundle (an adapter's strength,
    slots, tables).  low, kept: operator → how many of the graph compute in ``precision``, and in float32 still.
    layer_types: type of a layer's first output → how many layers of the parsed network.  tensor_types: tensor of the
    engine → its type and layout, by the library's inspector; empty where it was built without a GPU.  graph_error:
    normwise relative error of the typed graph in ONNX Runtime against the stored float64 reference, ``None`` if that
    could not be run; error_limit: what was allowed.  command: what builds it again.
    """

    name: str
    target: str
    precision: str
    file: str = ""
    sha256: str = ""
    bytes: int = 0
    library_version: str
    compute_capabilities: list[str]
    profile: dict[str, Sizes]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    optional: list[str] = []
    tf32: bool = False
    refit: bool = False
    low: dict[str, int] = {}
    kept: dict[str, int] = {}
    layer_types: dict[str, int] = {}
    tensor_types: dict[str, str] = {}
    graph_error: float | None = None
    error_limit: float
    seconds: float
    command: str
