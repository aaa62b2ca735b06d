"""Try a runtime, a target or the GPU in a process of its own: what crashes there takes nothing down here.

``python -m deployfa.runtimes.probe NAME`` prints one JSON object; ``probe(NAME)`` starts it and reads it.  It needs a
base install only, and reports nothing that was not tried: a target runs here if a graph ran on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from typing import Any

import msgspec

from deployfa.errors import DeployfaError

__all__ = ["DEVICES", "LIBRARY", "RUNTIME", "Device", "Found", "probe"]

#: What can be probed besides a target: ``library:TARGET`` is the library that builds the engines of that target.
DEVICES, RUNTIME, LIBRARY = "devices", "onnxruntime", "library:"
_TIMEOUT_S = 120.0


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU.  compute_capability: as NVIDIA writes it, ``8.9``."""

    name: str
    compute_capability: str
    memory_bytes: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What one probe found.

    ok: it loaded, or the graph ran and answered right.  reason: why not, in one line.  import_ms: of the library,
    ``None`` where nothing was imported.  The rest is empty where it does not apply; driver: NVIDIA's version, and cuda:
    the CUDA version that it supports.
    """

    ok: bool
    reason: str | None = None
    version: str | None = None
    import_ms: float | None = None
    providers: list[str] = []
    compute_capabilities: list[str] = []
    devices: list[Device] = []
    driver: str | None = None
    cuda: str | None = None


def probe(name: str, *, timeout_s: float = _TIMEOUT_S) -> Found:
    """Run the probe ``name`` in a process of its own; one that dies or hangs is a ``Found`` that is not ok."""
    command = [sys.executable, "-m", "deployfa.runtimes.probe", name]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return Found(ok=False, reason=f"did not answer within {timeout_s:g} s")
    with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=Found)
    how = f"was killed by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return Found(ok=False, reason=f"crashed while loading: its process {how}" + (f" ({said[-1]})" if said else ""))


def _try(name: str) -> Found:
    try:
        if name == DEVICES:
            return _devices()
        if name == RUNTIME:
            return _onnxruntime()
        if name.startswith(LIBRARY):
            return _library(name.removeprefix(LIBRARY))
        return _target(name)
    except DeployfaError as error:
        return Found(ok=False, reason=str(error))


def _onnxruntime() -> Found:
    start = time.perf_counter()
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            return Found(ok=False, reason=f"onnxruntime lacks {error.name}; install it again")
        return Found(ok=False, reason="onnxruntime is not installed")
    except Exception as error:  # a broken wheel fails in any way
        return Found(ok=False, reason=f"onnxruntime does not load ({_first_line(error)})")
    spent = 1e3 * (time.perf_counter() - start)
    return Found(ok=True, version=ort.__version__, import_ms=spent, providers=list(ort.get_available_providers()))


def _library(target: str) -> Found:
    from deployfa.runtimes.tensorrt import load_library

    start = time.perf_counter()
    library = load_library(target)
    spent = 1e3 * (time.perf_counter() - start)
    # its own libraries are loaded, and refuse, only now
    builder = library.api.Builder(library.api.Logger(library.api.Logger.ERROR))
    if builder is None:
        return Found(ok=False, reason=f"{target} {library.version} makes no builder", version=library.version)
    return Found(
        ok=True,
        version=library.version,
        import_ms=spent,
        compute_capabilities=list(library.compute_capabilities),
    )


def _target(target: str) -> Found:
    """Open ``y = x W`` on ``target``, run it, and hold the answer against numpy's."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from deployfa.runtimes.targets import open_runner

    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    x = np.ones((2, 4), np.float32)
    answer = open_runner(target, model.SerializeToString()).run({"x": x})["y"]
    # small integers: exact in every precision
    if not np.array_equal(answer, x @ weight):
        return Found(ok=False, reason=f"{target} answers a product of integers wrongly; install it again")
    return Found(ok=True)


def _devices() -> Found:
    """By NVIDIA's driver API where its bindings are installed, else by ``nvidia-smi``."""
    tried = []
    for way in (_by_bindings, _by_smi):
        found = way()
        if found.ok:
            return found
        tried.append(found.reason or "")
    return Found(ok=False, reason=f"no NVIDIA GPU found ({'; '.join(tried)})")


def _by_bindings() -> Found:
    try:
        from cuda.bindings import driver
    except ModuleNotFoundError:
        return Found(ok=False, reason="cuda-bindings is not installed")
    except Exception as error:  # its loader fails in its own ways
        return Found(ok=False, reason=f"cuda-bindings does not load: {_first_line(error)}")

    def call(function: Any, *arguments: Any) -> Any:
        result, *values = function(*arguments)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{function.__name__} answered {result.name}")
        return values[0] if values else None

    attribute = driver.CUdevice_attribute
    try:
        call(driver.cuInit, 0)
        devices = []
        for index in range(call(driver.cuDeviceGetCount)):
            device = call(driver.cuDeviceGet, index)
            major = call(driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
            minor = call(driver.cuDeviceGetAttribute, attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
            devices.append(
                Device(
                    name=bytes(call(driver.cuDeviceGetName, 256, device)).split(b"\0")[0].decode(),
                    compute_capability=f"{major}.{minor}",
                    memory_bytes=int(call(driver.cuDeviceTotalMem, device)),
                )
            )
        cuda = call(driver.cuDriverGetVersion)
    except Exception as error:  # what call raises, and its loader's own where there is no driver
        missing = type(error).__name__ == "DynamicLibNotFoundError"
        return Found(ok=False, reason=f"cuda-bindings: {'there is no driver' if missing else _first_line(error)}")
    if not devices:
        return Found(ok=False, reason="cuda-bindings: the driver knows no device")
    return Found(ok=True, devices=devices, driver=_by_smi().driver, cuda=f"{cuda // 1000}.{cuda % 1000 // 10}")


def _by_smi() -> Found:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Found(ok=False, reason="nvidia-smi is not there")
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Found(ok=False, reason=f"nvidia-smi: {_first_line(error)}")
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not rows or any(len(row) != 4 for row in rows):
        said = (done.stdout.strip() or done.stderr.strip()).splitlines()
        return Found(ok=False, reason=f"nvidia-smi: {said[0] if said else 'no answer'}")
    devices = [
        Device(name=name, compute_capability=capability, memory_bytes=int(mebibytes) * 2**20)
        for name, capability, mebibytes, _ in rows
        if mebibytes.isdigit()
    ]
    return Found(ok=bool(devices), devices=devices, driver=rows[0][3])


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def main(name: str) -> None:
    """Try ``name`` and print what was found; whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    found = _try(name)
    answers.write(msgspec.json.encode(found))
    answers.flush()
    # some libraries crash while they are taken down, after the answer is known
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
