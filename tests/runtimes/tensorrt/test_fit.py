"""An engine of another library or another GPU is refused, with the command that builds it again."""

from __future__ import annotations

import msgspec
import pytest

from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.tensorrt.fit import check_device, check_version
from deployfa.runtimes.tensorrt.record import EngineRecord

COMMAND = "deployfa compile my.bundle --target tensorrt-rtx --precision fp32 --force"
RECORD = EngineRecord(
    name="tensorrt-rtx-fp32",
    target="tensorrt-rtx",
    precision="fp32",
    library_version="1.7.1.116",
    compute_capabilities=["8.6", "8.9"],
    profile={},
    inputs=[],
    outputs=[],
    error_limit=1e-6,
    seconds=1.0,
    command=COMMAND,
)


def test_the_version_that_built_it() -> None:
    check_version(RECORD, "1.7.1.116")
    for other in ("1.7.1.117", "1.7.1", "1.8.0.1", ""):
        with pytest.raises(RuntimeTargetError) as caught:
            check_version(RECORD, other)
        assert str(caught.value) == (
            f"engine tensorrt-rtx-fp32 was built by tensorrt-rtx 1.7.1.116, here is {other}; build it again: {COMMAND}"
        )


def test_the_gpus_that_it_was_built_for() -> None:
    check_device(RECORD, "NVIDIA L4", "8.9")
    with pytest.raises(RuntimeTargetError) as caught:
        check_device(RECORD, "NVIDIA H100", "9.0")
    assert str(caught.value) == (
        "engine tensorrt-rtx-fp32 was built for compute capability 8.6, 8.9, and NVIDIA H100 has 9.0; "
        f"build it again: {COMMAND} --compute-capability 9.0"
    )


def test_an_engine_of_the_gpu_at_hand_names_none() -> None:
    """TensorRT's own: the library itself compares the GPU when it loads the engine."""
    check_device(msgspec.structs.replace(RECORD, compute_capabilities=[]), "NVIDIA H100", "9.0")
