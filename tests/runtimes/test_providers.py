"""Targets of ONNX Runtime: what is asked for is given or refused in one line.  Where there is a GPU, they run."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployfa.errors import DeployfaError, InputError, MissingExtraError, RuntimeTargetError
from deployfa.runtimes import providers
from deployfa.runtimes.context import check_trusted, compile_context
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.providers import PROVIDERS, attach
from deployfa.runtimes.targets import DEFAULT_TARGET, TARGETS, open_onnxruntime, open_runner

RTX = "onnxruntime-tensorrt-rtx"
X = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
WEIGHT = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)


def save(path: Path, nodes: list[Any]) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 4])],
        [value("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("g") / "linear.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a compiled graph looks like: a node with an engine in it, inside a branch of another one."""
    engine = helper.make_node(
        "EPContext", ["x"], ["y"], name="engine", domain="com.microsoft", embed_mode=1, ep_cache_context=b"machine code"
    )
    return save(tmp_path_factory.mktemp("c") / "compiled.onnx", [engine])


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1" if sys.platform == "linux" else "nvcuda.dll")
    except OSError:
        return False
    return True


def skip_unless_it_can_run(target: str) -> None:
    if not has_driver():
        pytest.skip("no NVIDIA driver on this machine")
    provider = PROVIDERS[target]
    if provider.plugin is None and provider.name not in ort.get_available_providers():
        pytest.skip(f"{provider.name} is not in this onnxruntime")


def test_every_provider_is_a_target_and_the_default_is_the_cpu() -> None:
    assert set(PROVIDERS) <= set(TARGETS)
    assert DEFAULT_TARGET == "onnxruntime-cpu"


def test_a_target_opens_a_runner_that_computes(linear: Path) -> None:
    runner = open_runner("onnxruntime-cpu", linear, threads=1, spinning=False)
    np.testing.assert_allclose(runner.run({"x": X})["y"], X @ WEIGHT, rtol=1e-5)


def test_options_reach_the_runner(linear: Path) -> None:
    other = np.zeros((4, 3), np.float32)
    runner = open_runner("onnxruntime-cpu", linear, threads=1, initializers={"w": other})
    assert not runner.run({"x": X})["y"].any()
    with pytest.raises(InputError, match="threads is 0"):
        open_runner("onnxruntime-cpu", linear, threads=0)


@pytest.mark.parametrize("opener", [open_runner, open_onnxruntime])
def test_an_unknown_target_lists_the_known_ones(opener: Any, linear: Path) -> None:
    with pytest.raises(InputError, match="no target 'onnxruntime-gpu'; targets: onnxruntime-cpu, onnxruntime-cuda"):
        opener("onnxruntime-gpu", linear)


@pytest.mark.parametrize("target", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_provider_that_this_build_lacks_is_refused_with_what_to_install(target: str, linear: Path) -> None:
    if PROVIDERS[target].name in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has {PROVIDERS[target].name}")
    with pytest.raises(RuntimeTargetError) as caught:
        open_runner(target, linear)
    assert str(caught.value) == (
        f"provider '{PROVIDERS[target].name}' is not in this onnxruntime; available: "
        f"{', '.join(ort.get_available_providers())}; run: pip install {PROVIDERS[target].install}, or pick the target "
        "onnxruntime-cpu"
    )


def test_without_a_driver_the_plugin_says_so(linear: Path) -> None:
    """The real library, registered with the real onnxruntime; and a failure is not remembered as a success."""
    if has_driver():
        pytest.skip("this machine has a driver")
    for _ in range(2):
        with pytest.raises(RuntimeTargetError) as caught:
            open_runner(RTX, linear)
        message = str(caught.value)
        assert message.startswith("the library of NvTensorRTRTXExecutionProvider does not load (libcuda.so.1: cannot ")
        assert message.endswith(
            "onnxruntime-tensorrt-rtx needs an NVIDIA GPU of compute capability 8.6, 8.9 or 12.x and its driver: "
            "install what is missing, or pick the target onnxruntime-cpu"
        )


def test_without_the_plugin_its_extra_is_named(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    providers._register.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'deployfa\[cpu,tensorrt-rtx\]'"):
        open_runner(RTX, linear)


def test_a_plugin_without_a_device_is_refused(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library had loaded: ONNX Runtime then lists its devices, of which this machine has the CPU alone."""
    if has_driver():
        pytest.skip("this machine may have a device")
    monkeypatch.setattr(providers, "_register", lambda target: None)
    with pytest.raises(
        RuntimeTargetError, match=r"NvTensorRTRTXExecutionProvider finds no device here; .* needs an NVI"
    ):
        open_runner(RTX, linear)


def test_devices_are_given_to_the_session_and_not_named(linear: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a plug-in, walked with the one device that every machine has."""
    assert [device.ep_name for device in ort.get_ep_devices()] == ["CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: [])
    options = ort.SessionOptions()
    asked = attach(ort, options, "CPUExecutionProvider")
    assert options.has_providers() and "providers" not in asked.arguments
    session = ort.InferenceSession(str(linear), sess_options=options, **asked.arguments)
    np.testing.assert_allclose(session.run(None, {"x": X})[0], X @ WEIGHT, rtol=1e-5)


def test_what_a_build_prints_while_it_looks_for_libraries_stays_out_of_our_output(
    linear: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def preload_dlls() -> None:
        print("Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", preload_dlls)
    asked = attach(ort, ort.SessionOptions(), "CUDAExecutionProvider")
    assert asked.missing == ("libcublas.so.13",)
    assert asked.arguments["provider_options"] == [{"use_tf32": "0"}]
    assert capsys.readouterr().out == ""
    more = attach(ort, ort.SessionOptions(), "CUDAExecutionProvider", {"user_compute_stream": "7"})
    assert more.arguments["provider_options"] == [{"use_tf32": "0", "user_compute_stream": "7"}]


def test_compiling_where_the_provider_cannot_be_had_writes_nothing(linear: Path, tmp_path: Path) -> None:
    out = tmp_path / "compiled.onnx"
    for target in [name for name in PROVIDERS if name != "onnxruntime-cpu"]:
        if has_driver():
            pytest.skip("this machine has a driver")
        with pytest.raises(RuntimeTargetError):
            compile_context(linear, out, target)
    # ONNX Runtime's compiler itself, asked for a provider that compiles nothing
    with pytest.raises(
        RuntimeTargetError, match=r"CPUExecutionProvider does not compile .*Unable to compile any nodes"
    ):
        compile_context(linear, out, "onnxruntime-cpu")
    with pytest.raises(InputError, match="'tensorrt' is no provider of ONNX Runtime; pick from: onnxruntime-cpu"):
        compile_context(linear, out, "tensorrt")
    with pytest.raises(InputError, match="no graph at"):
        compile_context(tmp_path / "absent.onnx", out, "onnxruntime-cpu")
    assert list(tmp_path.iterdir()) == []


def test_engines_in_a_graph_are_code_that_somebody_must_vouch_for(compiled: Path, linear: Path) -> None:
    import hashlib

    with pytest.raises(RuntimeTargetError, match=r"compiled\.onnx' holds compiled engines, which are code"):
        check_trusted(compiled, None)
    with pytest.raises(RuntimeTargetError, match="the graph holds compiled engines"):
        check_trusted(compiled.read_bytes(), None)
    digest = hashlib.sha256(compiled.read_bytes()).hexdigest()
    check_trusted(compiled, digest)
    check_trusted(linear, None)
    changed = compiled.read_bytes().replace(b"machine code", b"another code")
    with pytest.raises(RuntimeTargetError, match="not the one that was vouched for"):
        check_trusted(changed, digest)
    # ONNX Runtime's own format begins otherwise, and could hold the same
    with pytest.raises(RuntimeTargetError, match="is not an ONNX graph"):
        check_trusted(b"\x18\x00\x00\x00ORTM" + bytes(64), None)


def test_a_session_is_not_made_of_engines_that_nobody_vouches_for(compiled: Path) -> None:
    """Refused by us before ONNX Runtime sees the graph; vouched for, it is ONNX Runtime that has no provider for it."""
    import hashlib

    with pytest.raises(RuntimeTargetError, match="which are code"):
        OnnxRuntimeRunner(compiled, provider="AzureExecutionProvider")
    digest = hashlib.sha256(compiled.read_bytes()).hexdigest()
    with pytest.raises(RuntimeTargetError, match="onnxruntime does not load"):
        OnnxRuntimeRunner(compiled, provider="AzureExecutionProvider", trusted_sha256=digest)


def test_an_engine_in_a_branch_is_found(tmp_path: Path, compiled: Path) -> None:
    inner = onnx.load(compiled).graph
    del inner.input[:], inner.initializer[:]
    condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True), "c"))
    choice = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    with pytest.raises(RuntimeTargetError, match="which are code"):
        check_trusted(save(tmp_path / "branch.onnx", [condition, choice]), None)


def test_importing_the_targets_loads_no_runtime() -> None:
    code = (
        "import sys, deployfa.runtimes.targets\n"
        "print([m for m in ('onnxruntime', 'tensorrt', 'tensorrt_rtx_bindings', 'cuda.bindings') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("target", [name for name in PROVIDERS if name != "onnxruntime-cpu"])
def test_a_bundle_runs_on_the_gpu_as_on_the_cpu(target: str, linear: Path) -> None:
    """Within ten times the rounding bound of a float32 product of four terms, summed in any order."""
    skip_unless_it_can_run(target)
    found = open_runner(target, linear).run({"x": X})["y"]
    exact = X.astype(np.float64) @ WEIGHT
    bound = 10 * 4 * np.finfo(np.float32).eps * (np.abs(X).astype(np.float64) @ np.abs(WEIGHT))
    assert (np.abs(found - exact) <= bound).all()


@pytest.mark.gpu
def test_a_compiled_graph_opens_with_its_sha256_alone(linear: Path, tmp_path: Path) -> None:
    skip_unless_it_can_run(RTX)
    out = tmp_path / "compiled.onnx"
    try:
        digest = compile_context(linear, out, RTX)
    except DeployfaError as error:
        if "finds no device" in str(error):
            pytest.skip(str(error))
        raise
    name = PROVIDERS[RTX].name
    with pytest.raises(RuntimeTargetError, match="which are code"):
        OnnxRuntimeRunner(out, provider=name)
    found = OnnxRuntimeRunner(out, provider=name, trusted_sha256=digest).run({"x": X})["y"]
    np.testing.assert_array_equal(found, open_runner(RTX, linear).run({"x": X})["y"])
