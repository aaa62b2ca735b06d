"""Events: what they time on a GPU, and what they say where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.tensorrt.device import Buffer, Device, Event, Stream


@pytest.fixture
def device() -> Iterator[Device]:
    try:
        made = Device()
    except RuntimeTargetError as error:
        pytest.skip(str(error))
    yield made


@pytest.mark.gpu
def test_events_time_what_lies_between_them(device: Device) -> None:
    import numpy as np

    stream, start, middle, end = Stream(device), Event(device), Event(device), Event(device)
    array = np.zeros(64 << 20, np.uint8)
    buffer = Buffer(device, array.nbytes)
    start.record(stream)
    buffer.upload(array, stream)
    middle.record(stream)
    for _ in range(4):
        buffer.upload(array, stream)
    end.record(stream)
    end.wait()
    one, four, all_ = middle.elapsed_ms(start), end.elapsed_ms(middle), end.elapsed_ms(start)
    # 64 MiB take more than half a millisecond on any bus there is (128 GB/s)
    assert one > 0.5 and four > one
    # the clock's resolution is half a microsecond, twice
    assert all_ == pytest.approx(one + four, abs=0.002)
    for each in (start, middle, end, stream, buffer):
        each.close()


def test_without_a_gpu_every_call_of_an_event_names_what_failed() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    status, count = runtime.cudaGetDeviceCount()
    if not int(status) and count:
        pytest.skip("there is a GPU")
    # the bindings are the real ones; only the check for a GPU, which Device begins with, is left out
    device = object.__new__(Device)
    device.runtime = runtime
    with pytest.raises(RuntimeTargetError, match=rf"cudaEventCreate failed on the GPU \({status.name}"):
        Event(device)
    stream, event = object.__new__(Stream), object.__new__(Event)
    stream._device = event._device = device
    stream.handle, event.handle = runtime.cudaStream_t(0), runtime.cudaEvent_t(0)
    for call, name in (
        (lambda: event.record(stream), "cudaEventRecord"),
        (event.wait, "cudaEventSynchronize"),
        (lambda: event.elapsed_ms(event), "cudaEventElapsedTime"),
        (event.close, "cudaEventDestroy"),
    ):
        with pytest.raises(RuntimeTargetError, match=rf"{name} failed on the GPU \({status.name}"):
            call()
