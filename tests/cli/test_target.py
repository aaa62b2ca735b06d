"""``--target``: what is asked for is what runs, and what ran is in the report."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import onnxruntime as ort
import pytest

from deployfa.adapter import Adapter
from deployfa.bench import BenchReport
from deployfa.bench.contender import Contender, check_contenders
from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_slots
from deployfa.errors import InputError, RuntimeTargetError
from deployfa.mixed import MixedRunner
from deployfa.pack import pack
from deployfa.parity import ParityReport
from deployfa.pipeline import check_export_options
from deployfa.predict import Predictor
from deployfa.runtimes import targets
from deployfa.slots import export_slots

CUDA = "onnxruntime-cuda"

needs_no_cuda = pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA's provider"
)


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["folded"], tmp_path / "folded"))


def meant_for(path: Path, target: str) -> Path:
    """``path``, as if it had been exported for ``target``; the manifest is the one file that nothing vouches for."""
    file = path / "manifest.json"
    document = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode({**document, "target": target}))
    return path


@needs_no_cuda
@pytest.mark.parametrize(
    "command",
    [["run", "-t", "a joy"], ["verify", "--no-torch"], ["bench", "--shapes", "1x8", "--samples", "11"]],
    ids=lambda command: command[0],
)
def test_a_target_that_cannot_be_had_is_one_line(cli, bundle: Path, command: list[str]) -> None:
    before = (bundle / "manifest.json").read_bytes()
    result = cli(command[0], bundle, *command[1:], "--target", CUDA)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("·")]
    assert line.startswith("error: ")
    assert "provider 'CUDAExecutionProvider' is not in this onnxruntime" in line
    assert "pip install 'deployfa[gpu]'" in line and "pick the target onnxruntime-cpu" in line
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("command", ["run", "verify", "bench"])
def test_an_unknown_target_lists_the_known_ones(cli, bundle: Path, command: str) -> None:
    text = ["-t", "a joy"] if command == "run" else []
    result = cli(command, bundle, *text, "--target", "gpu")
    assert result.returncode == 2
    assert "no target 'gpu'; targets: onnxruntime-cpu, onnxruntime-cuda" in result.stderr


def test_reports_and_summaries_say_where_it_ran(cli, bundle: Path) -> None:
    verified = cli("verify", bundle, "--no-torch", "--json", "--target", "onnxruntime-cpu")
    assert msgspec.json.decode(verified.stdout, type=ParityReport).target == "onnxruntime-cpu"
    command = ["bench", bundle, "--shapes", "1x8", "--samples", "11", "--launches", "1", "--max-seconds", "2"]
    benched = cli(*command, "--target", "onnxruntime-cpu", "--json")
    assert benched.returncode == 0, benched.stderr
    (contender,) = msgspec.json.decode(benched.stdout, type=BenchReport).contenders
    assert contender.target == "onnxruntime-cpu"
    manifest = Bundle.open(bundle).manifest
    assert manifest.parity is not None and manifest.bench is not None
    assert manifest.parity["target"] == manifest.bench["target"] == "onnxruntime-cpu"


@needs_no_cuda
def test_the_bundles_own_target_is_the_default_and_an_option_overrides_it(cli, bundle: Path) -> None:
    meant_for(bundle, CUDA)
    assert "provider 'CUDAExecutionProvider'" in cli("run", bundle, "-t", "a joy").stderr
    assert "provider 'CUDAExecutionProvider'" in cli("verify", bundle, "--no-torch").stderr
    assert cli("run", bundle, "-t", "a joy", "--target", "onnxruntime-cpu").returncode == 0


@needs_no_cuda
def test_slots_and_packs_ask_for_their_target_too(trained: dict[str, Path], tmp_path: Path) -> None:
    vefa = Adapter.load(trained["vefa"])
    slots = export_slots(vefa, tmp_path / "slots", optimize="none", idle_branch=False).bundle
    packed = pack({"vefa": vefa}, tmp_path / "pack", optimize="none").bundle
    for opener in (open_slots, Predictor):
        with pytest.raises(RuntimeTargetError, match="provider 'CUDAExecutionProvider'"):
            opener(slots, target=CUDA)
    for opener in (MixedRunner, Predictor):
        with pytest.raises(RuntimeTargetError, match="provider 'CUDAExecutionProvider'"):
            opener(packed, target=CUDA)
    for bundle in (slots, packed):
        meant = Bundle.open(meant_for(bundle.path, CUDA))
        with pytest.raises(RuntimeTargetError, match="provider 'CUDAExecutionProvider'"):
            Predictor(meant)
        assert Predictor(meant, target="onnxruntime-cpu")


def test_a_target_of_another_runtime_has_no_slots(bundle: Path) -> None:
    with pytest.raises(RuntimeTargetError, match="this runs in ONNX Runtime, which tensorrt is not; pick from: onnxru"):
        targets.open_onnxruntime("tensorrt", bundle / "model.onnx")


def test_an_engine_is_no_graph(bundle: Path) -> None:
    with pytest.raises(RuntimeTargetError, match="runs engines, not graphs; make one of a bundle: deployfa compile"):
        targets.open_runner("tensorrt-rtx", bundle / "model.onnx")


def test_contenders_of_an_unknown_target_are_refused_before_a_worker_starts(bundle: Path) -> None:
    with pytest.raises(InputError, match="no target 'gpu'"):
        check_contenders([Contender(label="a", graph=bundle / "model.onnx", target="gpu")])


def test_a_graph_for_another_target_keeps_to_standard_operators() -> None:
    assert check_export_options("onnxruntime-cpu", "auto") == "auto"
    assert check_export_options("onnxruntime-cpu", "ort") == "ort"
    assert check_export_options(CUDA, "auto") == "none"
    assert check_export_options(CUDA, "ort") == "ort"
    assert check_export_options("onnxruntime-tensorrt", "auto") == "none"
    for target in ("onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"):
        with pytest.raises(InputError, match=r"TensorRT fuses for itself .* pass --optimize none"):
            check_export_options(target, "ort")
    with pytest.raises(InputError, match="no target 'gpu'"):
        check_export_options("gpu", "auto")


def test_an_export_for_a_gpu_runs_on_the_cpu_when_told_to(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "b"
    result = cli("export", "-a", trained["vefa"], "-o", out, "--target", "onnxruntime-tensorrt-rtx")
    assert result.returncode == 0, result.stderr
    manifest = Bundle.open(out).manifest
    assert (manifest.target, manifest.optimization.chosen) == ("onnxruntime-tensorrt-rtx", "none")
    assert cli("verify", out, "--no-torch", "--target", "onnxruntime-cpu").returncode == 0
