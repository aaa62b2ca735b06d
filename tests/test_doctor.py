"""The doctor says what was tried: real probes on this machine, and machines put together from what probes find."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import onnxruntime as ort
import pytest

from deployfa import doctor
from deployfa.doctor import DoctorReport, TargetState, examine, known_targets
from deployfa.errors import InputError
from deployfa.runtimes.probe import DEVICES, RUNTIME, Device, Found, probe
from deployfa.runtimes.providers import PROVIDERS
from deployfa.runtimes.tensorrt import LIBRARIES, load_library

L40 = Device(name="NVIDIA L40", compute_capability="8.9", memory_bytes=48 * 10**9)
H100 = Device(name="NVIDIA H100", compute_capability="9.0", memory_bytes=80 * 10**9)
ALL_PACKAGES = {package: "1.0" for package in doctor._PACKAGES if package != "onnxruntime"}


@pytest.fixture(scope="module")
def here() -> DoctorReport:
    return examine()


def by_target(report: DoctorReport) -> dict[str, TargetState]:
    return {state.target: state for state in report.targets}


def machine(devices: list[Device], *, answers: bool = True):
    """A machine on which everything loads: what its probes find.  answers: whether graphs run on it."""

    def ask(name: str) -> Found:
        if name == DEVICES:
            reason = None if devices else "no NVIDIA GPU found"
            return Found(ok=bool(devices), devices=devices, reason=reason, driver="580.1", cuda="13.0")
        if name == "library:tensorrt-rtx":
            return Found(ok=True, version="1.7", import_ms=1.0, compute_capabilities=["8.6", "8.9", "12.0"])
        if name in PROVIDERS and not answers:
            return Found(ok=False, reason=f"{name} has no device; install what is missing")
        return Found(ok=True, version="1.0", import_ms=1.0)

    return ask


def test_every_target_is_reported_once(here: DoctorReport) -> None:
    assert tuple(state.target for state in here.targets) == known_targets()
    assert set(PROVIDERS) | set(LIBRARIES) == set(known_targets()) == set(doctor._NEEDS)


def test_what_it_says_of_this_machine_is_what_the_libraries_say(here: DoctorReport) -> None:
    runtimes = {state.name: state for state in here.runtimes}
    assert runtimes["onnxruntime"].version == ort.__version__ == here.versions["onnxruntime"]
    assert runtimes["onnxruntime"].providers == ort.get_available_providers()
    assert 0 < runtimes["onnxruntime"].import_ms < 60_000
    library = load_library("tensorrt-rtx")
    assert runtimes["tensorrt-rtx"].version == library.version
    assert runtimes["tensorrt-rtx"].compute_capabilities == list(library.compute_capabilities)
    states = by_target(here)
    assert states["onnxruntime-cpu"].build.yes and states["onnxruntime-cpu"].run.yes
    assert states["tensorrt-rtx"].build.yes


def test_every_no_has_a_reason_and_what_is_missing_has_a_command(here: DoctorReport) -> None:
    for state in here.targets:
        for answer in (state.build, state.run):
            assert answer.yes == (answer.reason is None)
            assert not (answer.yes and answer.install)
    states = by_target(here)
    if "tensorrt-cu13" not in here.versions:
        assert states["tensorrt"].build.install == states["tensorrt"].run.install == "pip install 'deployfa[tensorrt]'"
    if "onnxruntime-gpu" not in here.versions:
        assert states["onnxruntime-cuda"].run.install == (
            "pip uninstall -y onnxruntime && pip install 'deployfa[gpu]' 'onnxruntime-gpu[cuda,cudnn]'"
        )
    if here.no_devices is not None:
        # everything of it is installed: no pip command brings a GPU
        assert states["tensorrt-rtx"].run.reason == here.no_devices
        assert states["tensorrt-rtx"].run.install is None
        assert "libcuda.so.1" in (states["onnxruntime-tensorrt-rtx"].run.reason or "")
        assert states["onnxruntime-tensorrt-rtx"].run.install is None


def test_with_a_gpu_that_it_knows_everything_is_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda packages: ALL_PACKAGES)
    report = examine(ask=machine([L40]))
    assert all(state.build.yes and state.run.yes for state in report.targets)
    assert (report.devices, report.no_devices, report.driver, report.cuda) == ([L40], None, "580.1", "13.0")


@pytest.mark.parametrize("broken", ["devices", "capability", "bindings", "answers", "exporter"])
def test_each_thing_that_lacks_makes_a_no_of_its_own(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = dict(ALL_PACKAGES)
    if broken == "bindings":
        del packages["cuda-bindings"]
    if broken == "exporter":
        del packages["peft"]
    monkeypatch.setattr(doctor, "installed", lambda names: packages)
    devices = {"devices": [], "capability": [H100]}.get(broken, [L40])
    states = by_target(examine(ask=machine(devices, answers=broken != "answers")))
    rtx, plain, cuda = states["tensorrt-rtx"], states["tensorrt"], states["onnxruntime-cuda"]
    # ahead of time it builds without a GPU, whatever else is missing
    assert rtx.build.yes
    if broken == "devices":
        assert not rtx.run.yes and rtx.run.reason == "no NVIDIA GPU found"
        assert not plain.build.yes and not plain.run.yes and plain.build.reason == "no NVIDIA GPU found"
    elif broken == "capability":
        assert rtx.run.reason == ("tensorrt-rtx 1.7 runs on compute capability 8.6, 8.9, 12.0, and NVIDIA H100 has 9.0")
        assert plain.build.yes and plain.run.yes
    elif broken == "bindings":
        assert "cuda-bindings" in (rtx.run.reason or "") and rtx.run.install == "pip install 'deployfa[tensorrt-rtx]'"
        assert plain.run.install == "pip install 'deployfa[tensorrt]'"
    elif broken == "answers":
        assert (
            not cuda.run.yes
            and cuda.build.yes
            and cuda.run.reason == ("onnxruntime-cuda has no device; install what is missing")
        )
    else:
        assert cuda.build.reason == "base graphs that are not in the cache need peft" and cuda.run.yes
        assert cuda.build.install == "pip install 'deployfa[train]'"


def test_only_what_a_target_needs_is_tried() -> None:
    asked: list[str] = []

    def ask(name: str) -> Found:
        asked.append(name)
        return Found(ok=True)

    assert [state.target for state in examine(["tensorrt-rtx"], ask=ask).targets] == ["tensorrt-rtx"]
    assert sorted(asked) == [DEVICES, "library:tensorrt-rtx", RUNTIME]
    with pytest.raises(InputError, match="no target 'cuda'; targets: onnxruntime-cpu, onnxruntime-cuda"):
        examine(["cuda"])


def planted(folder: Path, module: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is found before the installed one of its name, in every process that is started from here."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(textwrap.dedent(code), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_library_that_crashes_when_imported_is_reported_and_nothing_else_suffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, "tensorrt", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", monkeypatch)
    report = examine(["tensorrt", "onnxruntime-cpu"])
    states = by_target(report)
    assert states["onnxruntime-cpu"].run.yes
    assert states["tensorrt"].build.reason == "crashed while loading: its process was killed by signal 11"


@pytest.mark.parametrize(
    ("module", "code", "name", "reason"),
    [
        ("onnxruntime", "raise ImportError('libfoo.so.1: no such file')", RUNTIME, "does not load (libfoo.so.1: no su"),
        ("onnxruntime", "import absent_module", RUNTIME, "onnxruntime lacks absent_module; install it again"),
        ("onnxruntime", "raise ModuleNotFoundError(name='onnxruntime')", RUNTIME, "onnxruntime is not installed"),
        (
            "onnxruntime",
            "raise ModuleNotFoundError(name='onnxruntime')",
            "onnxruntime-cpu",
            "pip install 'deployfa[cpu]'",
        ),
        ("tensorrt", "import time; time.sleep(60)", "library:tensorrt", "did not answer within 5 s"),
        ("tensorrt", "import sys; sys.exit(3)", "library:tensorrt", "its process ended with 3"),
        ("tensorrt", "__version__ = '8.6.1'", "library:tensorrt", "tensorrt is 8.6.1; deployfa needs 10.12"),
        (
            "tensorrt",
            "print('hello'); raise OSError('no libnvinfer')",
            "library:tensorrt",
            "does not load (no libnvinfer",
        ),
    ],
)
def test_a_broken_installation_is_told_in_one_line(
    module: str, code: str, name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, module, code, monkeypatch)
    found = probe(name, timeout_s=5)
    assert not found.ok
    assert reason in (found.reason or "") and "\n" not in (found.reason or "")


def test_what_a_library_prints_does_not_spoil_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import os
        os.write(1, b"a banner from C")
        __version__ = "10.13.2"
        class Logger:
            ERROR = 0
            def __init__(self, level): pass
        def Builder(logger): return object()
    """
    planted(tmp_path, "tensorrt", code, monkeypatch)
    found = probe("library:tensorrt")
    assert (found.ok, found.version, found.compute_capabilities) == (True, "10.13.2", [])


@pytest.mark.skipif(os.name == "nt", reason="a shell script in the place of nvidia-smi")
@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        ("NVIDIA L40, 8.9, 46068, 580.65.06", 0, ("580.65.06", [("NVIDIA L40", "8.9", 46068 * 2**20)])),
        ("A, 8.6, 1, 5\nB, 12.0, 2, 5", 0, ("5", [("A", "8.6", 2**20), ("B", "12.0", 2 * 2**20)])),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, None),
        ("", 0, None),
    ],
)
def test_without_bindings_nvidia_smi_is_asked(
    said: str, status: int, expected: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, "cuda", "raise ModuleNotFoundError(name='cuda')", monkeypatch)
    (tmp_path / "said").write_text(said, encoding="utf-8")
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat '{tmp_path / 'said'}'\nexit {status}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = probe(DEVICES)
    if expected is None:
        assert not found.ok and (found.reason or "").startswith(
            "no NVIDIA GPU found (cuda-bindings is not installed; nv"
        )
        assert said[:20] in (found.reason or "")
    else:
        devices = [(each.name, each.compute_capability, each.memory_bytes) for each in found.devices]
        assert (found.ok, found.driver, devices) == (True, *expected)


def test_importing_it_loads_no_runtime() -> None:
    code = (
        "import sys, deployfa, deployfa.cli.app, deployfa.doctor\n"
        "print([m for m in ('onnxruntime', 'torch', 'tensorrt', 'tensorrt_rtx_bindings', 'cuda') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
