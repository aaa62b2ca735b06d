"""Build an engine from a graph.

Strongly typed always: a tensor has the type that the graph gives it, and no flag lowers it.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Builder.html
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deployfa.atomic import write_file
from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.runner import TensorSpec
from deployfa.runtimes.tensorrt.library import Library, load_library
from deployfa.runtimes.tensorrt.messages import NodePlace, build_error, make_log, parse_error
from deployfa.runtimes.tensorrt.profiles import Sizes, resolve_profile, shape_range
from deployfa.runtimes.tensorrt.progress import Progress, make_monitor

__all__ = ["BuildRequest", "Built", "build", "default_capabilities"]

#: The oldest GPU that is built for unless asked: older ones have no float32 kernels in TensorRT for RTX.
_OLDEST_DEFAULT = (8, 0)


class BuildRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to build, as plain values: it crosses to a process of its own (see ``process``).

    graph: an .onnx file, its weights beside it.  inputs: the graph's signature,
    with the names of dimensions.  nodes: the graph's, in order, for messages.  profile: dynamic dimension → sizes (see
    ``profiles.resolve_profile``).  compute_capabilities: such as ``8.9``; empty for the library's default.
    workspace_bytes: scratch memory that a kernel may use, ``None`` for all there is.  tf32: let float32 products round
    their factors to 10 bits.  refit: an engine whose weights can be replaced by others of the same place
    (``REFIT_IDENTICAL``), which needs a GPU.  level: 0 (quick build) to 5 (quick engine).  timings: a file of what
    earlier builds measured, read and written where a library measures anything.
    """

    target: str
    graph: str
    inputs: list[TensorSpec]
    nodes: list[NodePlace] = []
    profile: dict[str, Sizes] = {}
    compute_capabilities: list[str] = []
    workspace_bytes: int | None = None
    tf32: bool = False
    refit: bool = False
    level: int | None = None
    timings: str | None = None


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """What was built.  layer_types: type of a layer's first output → how many layers, of the network as parsed.
    seconds: parsing and building.  tensor_types: tensor of the built engine → its type and layout, where a GPU lets the
    library's inspector read them.
    """

    library_version: str
    layer_types: dict[str, int]
    compute_capabilities: list[str]
    bytes: int
    seconds: float
    tensor_types: dict[str, str] = {}


def default_capabilities(library: Library) -> tuple[str, ...]:
    """All that have kernels for every type; one engine then runs on each of them."""
    return tuple(
        name for name in library.compute_capabilities if tuple(int(part) for part in name.split(".")) >= _OLDEST_DEFAULT
    )


def build(request: BuildRequest, out: Path, progress: Progress | None = None) -> Built:
    """Parse, build, and write the engine to ``out``, in this process.  progress: called with the share done, in [0, 1].

    A library that fails may take the process with it: ``process.build_engine`` is what others call.  Raises
    ``MissingExtraError`` without the library, ``InputError`` for a profile that lacks a dimension, and
    ``RuntimeTargetError``, which names the node, when the graph is not taken or not built.
    """
    begin = time.perf_counter()
    sizes = resolve_profile(request.inputs, request.profile, {})
    library = load_library(request.target)
    api = library.api
    log = make_log(api)
    builder = _builder(library, log)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, log)
    if not parser.parse_from_file(request.graph):
        raise parse_error(library.target, parser, log.errors, request.nodes)
    config = builder.create_builder_config()
    capabilities = _configure(library, config, request)
    if any(isinstance(size, str) for spec in request.inputs for size in spec.shape):
        config.add_optimization_profile(_profile(builder, request.inputs, sizes))
    if progress is not None:
        config.progress_monitor = make_monitor(api, progress)
    cache = _timing_cache(library, config, request.timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise build_error(library.target, log.errors, request.nodes, refit=request.refit)
    out.write_bytes(plan)
    if cache is not None and request.timings is not None:
        with write_file(Path(request.timings), force=True) as partial:
            partial.write_bytes(cache.serialize())
    if progress is not None:
        # the library's own last phase ends short of it
        progress(1.0)
    kinds = Counter(_layer_type(network.get_layer(number)) for number in range(network.num_layers))
    return Built(
        library_version=library.version,
        layer_types=dict(sorted(kinds.items())),
        compute_capabilities=list(capabilities),
        bytes=plan.nbytes,
        seconds=time.perf_counter() - begin,
        tensor_types=_inspected(api, log, plan),
    )


def _inspected(api: Any, log: Any, plan: Any) -> dict[str, str]:
    """From the engine inspector, which needs an engine that is loaded, and so a GPU of its kind; else empty."""
    try:
        engine = api.Runtime(log).deserialize_cuda_engine(plan)
        if engine is None:
            return {}
        text = engine.create_engine_inspector().get_engine_information(api.LayerInformationFormat.JSON)
        layers = json.loads(text).get("Layers", [])
        return {
            str(tensor["Name"]): str(tensor["Format/Datatype"])
            for layer in layers
            if isinstance(layer, dict)
            for tensor in layer.get("Outputs", [])
        }
    except Exception:  # what cannot be inspected is built all the same
        return {}


def _builder(library: Library, log: Any) -> Any:
    """TensorRT's builder needs the GPU that it builds for, and says so in its log."""
    try:
        return library.api.Builder(log)
    except Exception as error:  # pybind11 turns a null pointer into a TypeError
        reason = log.errors[0] if log.errors else str(error)
        raise RuntimeTargetError(
            f"{library.target} {library.version} cannot build here ({reason.strip()}); build where the GPU is, "
            "or use --target tensorrt-rtx, which builds without one"
        ) from error


def _configure(library: Library, config: Any, request: BuildRequest) -> tuple[str, ...]:
    api = library.api
    _flag(config, api.BuilderFlag.TF32, request.tf32)
    if request.refit:
        config.set_flag(api.BuilderFlag.REFIT_IDENTICAL)
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
    if request.level is not None:
        config.builder_optimization_level = request.level
    wanted = tuple(dict.fromkeys(request.compute_capabilities)) or default_capabilities(library)
    if wanted:
        capabilities = [library.capability(name) for name in wanted]
        config.num_compute_capabilities = len(wanted)
        for number, capability in enumerate(capabilities):
            if not config.set_compute_capability(capability, number):
                raise RuntimeTargetError(f"{library.target} refuses compute capability {wanted[number]}; leave it out")
    return wanted


def _flag(config: Any, flag: Any, on: bool) -> None:
    (config.set_flag if on else config.clear_flag)(flag)


def _profile(builder: Any, inputs: Sequence[TensorSpec], sizes: Mapping[str, Sizes]) -> Any:
    profile = builder.create_optimization_profile()
    for spec in inputs:
        profile.set_shape(spec.name, *shape_range(spec, sizes))
    return profile


def _timing_cache(library: Library, config: Any, file: str | None) -> Any:
    """TensorRT measures its kernels and remembers; TensorRT for RTX picks them on the device."""
    if library.rtx or file is None:
        return None
    known = Path(file).read_bytes() if Path(file).is_file() else b""
    cache = config.create_timing_cache(known)
    # one of another version or device is no use: begin anew
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _layer_type(layer: Any) -> str:
    with contextlib.suppress(Exception):
        if layer.num_outputs:
            return str(layer.get_output(0).dtype).rpartition(".")[2].lower()
    return "none"
