"""Memory, streams and events of one NVIDIA GPU, by NVIDIA's own bindings; every call checked.

Source: https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/runtime.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deployfa.edits import Array
from deployfa.errors import MissingExtraError, RuntimeTargetError

__all__ = ["Buffer", "Device", "Event", "Stream"]


class Device:
    """GPU ``number``, made the current one of this thread.

    name: as NVIDIA has it.  capability: such as ``8.9``.  Raises ``MissingExtraError`` without cuda-bindings and
    ``RuntimeTargetError`` when there is no such GPU, with the driver's own reason.
    """

    def __init__(self, number: int = 0, *, extra: str = "tensorrt-rtx") -> None:
        try:
            from cuda.bindings import runtime
        except ModuleNotFoundError as error:
            raise MissingExtraError("cuda-bindings", extra, "running an engine") from error
        self.runtime: Any = runtime
        status, count = runtime.cudaGetDeviceCount()
        if int(status) or not count:
            why = self._words(status) if int(status) else "none found"
            raise RuntimeTargetError(
                f"no NVIDIA GPU to run an engine on ({why}); copy the bundle to the device, or run it with "
                "--target onnxruntime-cpu"
            )
        if not 0 <= number < count:
            raise RuntimeTargetError(f"no GPU {number}; there are {count}, counted from 0")
        self.call(runtime.cudaSetDevice, number)
        self.number = number
        properties = self.call(runtime.cudaGetDeviceProperties, number)
        self.name = str(properties.name.decode(errors="replace")).rstrip("\0")
        self.capability = f"{properties.major}.{properties.minor}"

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a CUDA call.  Raises ``RuntimeTargetError``, which names the call, unless it succeeded."""
        status, *results = function(*arguments)
        if int(status):
            raise RuntimeTargetError(
                f"{function.__name__} failed on the GPU ({self._words(status)}); free GPU memory or restart the process"
            )
        return results[0] if results else None

    def _words(self, status: Any) -> str:
        _, words = self.runtime.cudaGetErrorString(status)
        return f"{status.name}: {words.decode(errors='replace')}"


class Stream:
    """A stream of its own, closed by ``close``."""

    def __init__(self, device: Device) -> None:
        self._device = device
        runtime = device.runtime
        self.handle = device.call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)

    def wait(self) -> None:
        """Until everything in the stream is done; raises what failed there."""
        self._device.call(self._device.runtime.cudaStreamSynchronize, self.handle)

    def capture(self, work: Callable[[], None]) -> Any:
        """What ``work`` puts into the stream, as a graph that ``launch`` runs in one call."""
        device, runtime = self._device, self._device.runtime
        device.call(
            runtime.cudaStreamBeginCapture, self.handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        try:
            work()
        except BaseException:
            # the capture must end, and what it holds is of no use
            runtime.cudaStreamEndCapture(self.handle)
            raise
        graph = device.call(runtime.cudaStreamEndCapture, self.handle)
        try:
            return device.call(runtime.cudaGraphInstantiate, graph, 0)
        finally:
            device.call(runtime.cudaGraphDestroy, graph)

    def launch(self, graph: Any) -> None:
        self._device.call(self._device.runtime.cudaGraphLaunch, graph, self.handle)

    def drop(self, graph: Any) -> None:
        self._device.call(self._device.runtime.cudaGraphExecDestroy, graph)

    def close(self) -> None:
        if self.handle is not None:
            self._device.call(self._device.runtime.cudaStreamDestroy, self.handle)
            self.handle = None


class Event:
    """A moment in a stream, by the GPU's own clock (about half a microsecond); closed by ``close``.

    Source: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__EVENT.html
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.handle = device.call(device.runtime.cudaEventCreate)

    def record(self, stream: Stream) -> None:
        """This moment comes when everything that is in ``stream`` now is done."""
        self._device.call(self._device.runtime.cudaEventRecord, self.handle, stream.handle)

    def wait(self) -> None:
        """Until the moment has come; raises what failed before it."""
        self._device.call(self._device.runtime.cudaEventSynchronize, self.handle)

    def elapsed_ms(self, start: Event) -> float:
        """From ``start`` to this event, in milliseconds; both must have come."""
        return float(self._device.call(self._device.runtime.cudaEventElapsedTime, start.handle, self.handle))

    def close(self) -> None:
        if self.handle is not None:
            self._device.call(self._device.runtime.cudaEventDestroy, self.handle)
            self.handle = None


class Buffer:
    """``size`` bytes on the GPU, at ``address``; freed by ``close``."""

    def __init__(self, device: Device, size: int) -> None:
        self._device = device
        self.size = size
        # a tensor without elements still needs an address
        self.address = int(device.call(device.runtime.cudaMalloc, max(size, 1)))

    def upload(self, array: Array, stream: Stream) -> None:
        """Copy a contiguous array in, in the order of the stream; ``array`` must live until that is done."""
        self._copy(self.address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice", stream)

    def download(self, array: Array, stream: Stream) -> None:
        """Fill a contiguous array, in the order of the stream."""
        self._copy(array.ctypes.data, self.address, array.nbytes, "cudaMemcpyDeviceToHost", stream)

    def _copy(self, to: int, source: int, size: int, kind: str, stream: Stream) -> None:
        if size > self.size:
            raise RuntimeTargetError(f"{size} bytes do not fit the {self.size} that the engine was given; report this")
        runtime = self._device.runtime
        if size:
            how = getattr(runtime.cudaMemcpyKind, kind)
            self._device.call(runtime.cudaMemcpyAsync, to, source, size, how, stream.handle)

    def close(self) -> None:
        if self.address:
            self._device.call(self._device.runtime.cudaFree, self.address)
            self.address = 0


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a numpy dtype, ml_dtypes' included."""
    if dtype == "bfloat16":
        return 2
    return np.dtype(dtype).itemsize
