"""What is refused before a GPU is touched; what needs one is in ``test_runner_gpu``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deployfa.bundle import Bundle
from deployfa.bundle.engines import read_engine
from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.tensorrt.device import Device
from deployfa.runtimes.tensorrt.record import EngineRecord
from deployfa.runtimes.tensorrt.runner import EngineRunner


@pytest.fixture(scope="module")
def engine(compiled: Path) -> tuple[bytes, EngineRecord]:
    bundle = Bundle.open(compiled)
    (record,) = bundle.manifest.engines
    return read_engine(bundle, record), record


def test_an_engine_of_another_version_is_not_loaded(engine: tuple[bytes, EngineRecord]) -> None:
    plan, record = engine
    other = msgspec.structs.replace(record, library_version="1.6.0.0")
    with pytest.raises(RuntimeTargetError) as caught:
        EngineRunner(plan, other)
    assert "was built by tensorrt-rtx 1.6.0.0, here is 1." in str(caught.value)
    assert str(caught.value).endswith(f"; build it again: {record.command}")


def test_without_a_gpu_one_line_says_what_to_do(engine: tuple[bytes, EngineRecord]) -> None:
    plan, record = engine
    try:
        Device()
    except RuntimeTargetError as reason:
        assert str(reason).startswith("no NVIDIA GPU to run an engine on (")
        assert str(reason).endswith("copy the bundle to the device, or run it with --target onnxruntime-cpu")
        assert "\n" not in str(reason)
        with pytest.raises(RuntimeTargetError) as caught:
            EngineRunner(plan, record)
        assert str(caught.value) == str(reason)
    else:
        pytest.skip("there is a GPU here")
