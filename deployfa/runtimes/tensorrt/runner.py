"""``EngineRunner``: an engine on a GPU, its buffers allocated once.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from deployfa.atomic import write_file
from deployfa.edits import Array
from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.onnxruntime import check_feeds
from deployfa.runtimes.runner import TensorSpec
from deployfa.runtimes.tensorrt.device import Buffer, Device, Stream, element_bytes
from deployfa.runtimes.tensorrt.fit import check_device, check_version
from deployfa.runtimes.tensorrt.library import load_library
from deployfa.runtimes.tensorrt.messages import make_log
from deployfa.runtimes.tensorrt.profiles import check_profile, shape_range
from deployfa.runtimes.tensorrt.record import EngineRecord

__all__ = ["EngineRunner"]

#: Captured graphs kept, one for each set of shapes; the least recently used goes first.
_CAPTURES = 32


class EngineRunner:
    """An engine, loaded.  Thread-safe: one run at a time.

    plan: its bytes, of which somebody has compared the sha256 (``deployfa.bundle.engines.read_engine``); record: what
    it is.  cuda_graphs: launch a run's kernels as one, captured at the first run of each set of shapes.  defaults: of
    every optional input of the record (slots, tables, strengths), uploaded once; a run may be fed another.
    runtime_cache: a file in which TensorRT for RTX keeps the kernels that it finishes on the device, so that the next
    process starts at once.

    Raises ``MissingExtraError`` without the library, and ``RuntimeTargetError`` when its version or the GPU is not the
    engine's, with the command that builds it again, or when there is no GPU.
    """

    def __init__(
        self,
        plan: bytes,
        record: EngineRecord,
        *,
        device: int = 0,
        cuda_graphs: bool = False,
        defaults: Mapping[str, Array] | None = None,
        runtime_cache: Path | None = None,
    ) -> None:
        self.record = record
        self._library = load_library(record.target)
        check_version(record, self._library.version)
        self._device = Device(device, extra=record.target)
        check_device(record, self._device.name, self._device.capability)
        self._lock = threading.Lock()
        self._log = make_log(self._library.api)
        self._runtime = self._library.api.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeTargetError(
                f"{record.target} does not load engine {record.name} ({self._said()}); build it again: {record.command}"
            )
        _check_signature(self._engine, record)
        self._cache_file = runtime_cache if self._library.rtx else None
        self._cache: Any = None
        self._context = self._make_context(cuda_graphs)
        self._stream = Stream(self._device)
        self._capturing = cuda_graphs and not self._library.rtx
        self._captures: OrderedDict[tuple[tuple[str, tuple[int, ...]], ...], Any] = OrderedDict()
        self._buffers = {spec.name: Buffer(self._device, _largest_bytes(spec, record)) for spec in record.inputs}
        self._buffers |= {spec.name: Buffer(self._device, size) for spec, size in self._output_sizes()}
        for name, buffer in self._buffers.items():
            self._must(self._context.set_tensor_address(name, buffer.address), f"give '{name}' its memory")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._defaults: dict[str, Array] = {}
        self._fed: set[str] = set()
        self.bind(defaults or {})

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` must be fed."""
        return tuple(spec for spec in self.record.inputs if spec.name not in self._defaults)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(self.record.outputs)

    @property
    def slots(self) -> tuple[TensorSpec, ...]:
        """What ``run`` may be fed besides: inputs with a default."""
        return tuple(spec for spec in self.record.inputs if spec.name in self._defaults)

    @property
    def device(self) -> Device:
        """The GPU that it runs on."""
        return self._device

    def bind(self, arrays: Mapping[str, Array]) -> None:
        """Make ``arrays`` the defaults of these inputs: one copy to the GPU now, none at a run.

        Raises ``RuntimeTargetError`` for a name that is no input, and for an array that does not fit it.
        """
        kept = self.values(arrays)
        with self._lock:
            held = [self._upload(name, array) for name, array in kept.items()]
            self._stream.wait()
            del held
            self._defaults |= kept
            self._fed -= set(kept)

    def values(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """``arrays``, checked against the inputs of their names."""
        check_feeds(arrays, (), optional=self.record.inputs)
        check_profile(arrays, self.record.inputs, self.record.profile)
        return dict(arrays)

    def run(self, feeds: Mapping[str, Array], bound: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """One inference: every input without a default, and any others, by name → every output by name, in memory of
        the host.

        bound: more feeds, such as an adapter for the slots; like all feeds, for this run only.  Raises
        ``RuntimeTargetError`` on a missing, extra or misshapen feed, or one that the engine was not built for, before
        the GPU is touched.
        """
        fed = {**(bound or {}), **feeds}
        check_feeds(fed, self.inputs, optional=self.slots)
        check_profile(fed, self.record.inputs, self.record.profile)
        with self._lock:
            # what the last run was fed in the place of a default gives way to it again
            back = {name: self._defaults[name] for name in self._fed - set(fed)}
            # noted before: a copy that fails half-way must not leave another's adapter for the next run
            self._fed |= set(fed) & set(self._defaults)
            held = [self._upload(name, array) for name, array in (*back.items(), *fed.items())]
            self._fed = set(fed) & set(self._defaults)
            self._execute()
            answers = {spec.name: self._download(spec) for spec in self.record.outputs}
            self._stream.wait()
            del held
        return answers

    def execute(self) -> None:
        """Run again on what was uploaded last; copies nothing and does not wait.  ``stream`` orders and times it."""
        with self._lock:
            self._execute()

    def replace_weights(self, weights: Mapping[str, Array]) -> None:
        """Put other weights in the place of the engine's, by their names in the graph; see ``refit``, which checks.

        Raises ``RuntimeTargetError`` if the library does not know a weight, needs more of them, or refuses.
        """
        api = self._library.api
        with self._lock:
            refitter = api.Refitter(self._engine, self._log)
            held = {name: np.ascontiguousarray(array) for name, array in weights.items()}
            for name, array in held.items():
                self._must(refitter.set_named_weights(name, api.Weights(array)), f"take the weight '{name}'")
            missing = refitter.get_missing_weights()
            self._must(not missing, f"refit without '{missing[0] if missing else ''}'")
            self._must(refitter.refit_cuda_engine(), "refit")
            for graph in self._captures.values():
                self._stream.drop(graph)
            self._captures.clear()

    @property
    def stream(self) -> Stream:
        """Where everything happens, in order."""
        return self._stream

    def close(self) -> None:
        """Free what is on the GPU, and keep the finished kernels for the next process."""
        self._save_cache()
        with self._lock, contextlib.suppress(RuntimeTargetError):
            for graph in self._captures.values():
                self._stream.drop(graph)
            self._captures.clear()
            for buffer in self._buffers.values():
                buffer.close()
            self._stream.close()

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _upload(self, name: str, array: Array) -> Array:
        """Begin the copy; the array returned must live until the stream has been waited for."""
        whole = np.ascontiguousarray(array)
        self._must(self._context.set_input_shape(name, whole.shape), f"take {list(whole.shape)} for '{name}'")
        self._shapes[name] = whole.shape
        self._buffers[name].upload(whole, self._stream)
        return whole

    def _download(self, spec: TensorSpec) -> Array:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        answer: Array = np.empty(shape, _numpy_type(spec.dtype))
        self._buffers[spec.name].download(answer, self._stream)
        return answer

    def _execute(self) -> None:
        if not self._capturing:
            self._enqueue()
            return
        key = tuple(sorted(self._shapes.items()))
        if key in self._captures:
            self._captures.move_to_end(key)
            self._stream.launch(self._captures[key])
            return
        # the first run of these shapes prepares them; a capture must not allocate
        self._enqueue()
        self._stream.wait()
        self._captures[key] = self._stream.capture(self._enqueue)
        if len(self._captures) > _CAPTURES:
            _, oldest = self._captures.popitem(last=False)
            self._stream.drop(oldest)

    def _enqueue(self) -> None:
        self._must(self._context.execute_async_v3(int(self._stream.handle)), "run")

    def _make_context(self, cuda_graphs: bool) -> Any:
        """TensorRT for RTX captures graphs itself and keeps finished kernels; TensorRT does neither."""
        api = self._library.api
        if not self._library.rtx:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if cuda_graphs:
            config.cuda_graph_strategy = api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._cache_file is not None:
            self._cache = config.create_runtime_cache()
            if self._cache_file.is_file():
                # one of another version or GPU is refused, and then made anew
                self._cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)

    def _save_cache(self) -> None:
        if self._cache is None or self._cache_file is None:
            return
        with write_file(self._cache_file, force=True) as partial:
            partial.write_bytes(self._cache.serialize())

    def _output_sizes(self) -> list[tuple[TensorSpec, int]]:
        """Bytes of every output at the largest sizes of the profile."""
        for spec in self.record.inputs:
            largest = shape_range(spec, self.record.profile)[2]
            self._must(self._context.set_input_shape(spec.name, largest), f"take {list(largest)} for '{spec.name}'")
        sizes = []
        for spec in self.record.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            if min(shape, default=0) < 0:
                raise RuntimeTargetError(
                    f"output '{spec.name}' of engine {self.record.name} has no largest size; run this bundle with "
                    "--target onnxruntime-cuda"
                )
            sizes.append((spec, math.prod(shape) * element_bytes(spec.dtype)))
        return sizes

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise RuntimeTargetError(
                f"engine {self.record.name} does not {what} ({self._said()}); build it again: {self.record.command}"
            )

    def _said(self) -> str:
        return " ".join(self._log.errors[-1].split()) if self._log.errors else "it does not say why"


def _check_signature(engine: Any, record: EngineRecord) -> None:
    """The engine must be the one that the record describes."""
    there = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    told = {spec.name for spec in (*record.inputs, *record.outputs)}
    if there != told:
        raise RuntimeTargetError(
            f"engine {record.name} differs from its record in {', '.join(sorted(there ^ told))}; "
            f"build it again: {record.command}"
        )


def _largest_bytes(spec: TensorSpec, record: EngineRecord) -> int:
    return math.prod(shape_range(spec, record.profile)[2]) * element_bytes(spec.dtype)


def _numpy_type(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(dtype)
