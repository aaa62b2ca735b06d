"""Engines of bundles, built for real: TensorRT for RTX needs no GPU to build."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.bundle.bundle import sha256_file, write_manifest
from deployfa.bundle.engines import engine_of, read_engine
from deployfa.bundle.open_engine import engine_defaults, open_engine
from deployfa.compile import Compiled, compile_bundle
from deployfa.errors import (
    BundleError,
    InputError,
    MissingExtraError,
    OutputExistsError,
    RuntimeTargetError,
    StorageError,
)
from deployfa.graph.storage import load_graph, save_graph
from deployfa.pack import pack
from deployfa.pipeline import export
from deployfa.predict import Predictor
from deployfa.runtimes.tensorrt import Sizes
from deployfa.slots import export_slots
from deployfa.unfused import unfused

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def adapters(trained: dict[str, Path]) -> dict[str, Adapter]:
    return {name: Adapter.load(path) for name, path in trained.items()}


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Bundle:
    """The folded bundle, fused for ONNX Runtime; a copy to write into."""
    return Bundle.open(shutil.copytree(bundles["folded"], tmp_path / "folded"))


def check_engine(bundle: Bundle, compiled: Compiled, optional: set[str]) -> None:
    engine = compiled.engine
    content = (bundle.path / engine.file).read_bytes()
    assert hashlib.sha256(content).hexdigest() == engine.sha256
    assert len(content) == engine.bytes
    assert engine.sha256[:12] in engine.file
    assert engine.graph_error is not None and 0 < engine.graph_error <= engine.error_limit
    assert set(engine.optional) == optional
    again = Bundle.open(bundle.path)
    assert again.manifest.engines == [engine]
    assert again.manifest.files[engine.file] == engine.sha256
    assert read_engine(again, engine_of(again, RTX)) == content
    assert set(engine_defaults(again, engine)) == optional
    names = {spec.name for spec in engine.inputs}
    assert names >= {"input_ids", "attention_mask", *optional}
    assert [spec.name for spec in engine.outputs] == ["logits"]
    assert engine.layer_types["float"] > 200


class TestBundles:
    def test_folded_and_fused_for_another_runtime(self, bundle: Bundle) -> None:
        compiled = compile_bundle(bundle, RTX)
        assert compiled.rebuilt, "the fused operators are ONNX Runtime's alone"
        check_engine(bundle, compiled, set())
        engine = compiled.engine
        assert engine.profile == {"batch": Sizes(1, 4, 16), "sequence": Sizes(1, 128, 512)}
        assert engine.compute_capabilities == ["8.0", "8.6", "8.9", "12.0", "12.1"]
        # the same graph without a fusion computes the same, bit for bit, when it is made from the base again
        assert all(node.domain in {"", "ai.onnx"} for node in unfused(bundle).model.graph)

    @pytest.mark.parametrize("method", ["vefa", "lorfa", "head"])
    def test_side_ops_and_the_base(self, adapters, tmp_path: Path, method: str) -> None:
        """``head``: the base and a classifier."""
        made = export(adapters[method], tmp_path / "bundle", placement="side-op", optimize="none").bundle
        compiled = compile_bundle(made, RTX, profile={"batch": Sizes(2, 2, 2)}, compute_capabilities=["8.9"])
        assert not compiled.rebuilt
        check_engine(made, compiled, set())
        assert compiled.engine.compute_capabilities == ["8.9"]
        assert compiled.engine.profile["batch"] == Sizes(2, 2, 2)

    @pytest.mark.parametrize(("optimize", "idle_branch"), [("none", True), ("none", False), ("ort", True)])
    def test_slots_are_inputs(self, adapters, tmp_path: Path, optimize: str, idle_branch: bool) -> None:
        made = export_slots(adapters["vefa"], tmp_path / "bundle", optimize=optimize, idle_branch=idle_branch).bundle
        compiled = compile_bundle(made, RTX)
        assert compiled.rebuilt is (optimize != "none")
        slots = {"adapter/lambda", "adapter/classifier/weight", "adapter/classifier/bias", "adapter_strength"}
        check_engine(made, compiled, slots)
        assert not np.any(engine_defaults(made, compiled.engine)["adapter/lambda"]), "empty until a run is fed one"

    @pytest.mark.parametrize("table_inputs", [False, True])
    def test_tables_of_64_adapters(self, adapters, tmp_path: Path, table_inputs: bool) -> None:
        own = adapters["vefa"]
        many = {}
        for number in range(64):
            scaled = {
                site: dataclasses.replace(edit, lam=(1 - number / 100) * edit.lam) for site, edit in own.edits.items()
            }
            many[f"a{number}"] = dataclasses.replace(own, edits=scaled)
        optimize = "ort" if table_inputs else "none"
        made = pack(many, tmp_path / "bundle", table_inputs=table_inputs, optimize=optimize, check=4).bundle
        compiled = compile_bundle(made, RTX)
        assert compiled.rebuilt is table_inputs
        tables = {"adapter/lambda", "adapter/classifier/weight", "adapter/classifier/bias"} if table_inputs else set()
        check_engine(made, compiled, {"adapter_strength", *tables})
        names = {spec.name: spec for spec in compiled.engine.inputs}
        assert names["adapter_ids"].dtype == "int64"
        if table_inputs:
            assert compiled.engine.profile["adapters"] == Sizes(1, 65, 130)

    @pytest.mark.parametrize(("precision", "kind", "coarser"), [("fp16", "half", 2**13), ("bf16", "bf16", 2**16)])
    def test_sixteen_bits(self, bundle: Bundle, precision: str, kind: str, coarser: int) -> None:
        compiled = compile_bundle(bundle, RTX, precision=precision)
        engine = compiled.engine
        assert engine.layer_types[kind] > 300 > engine.layer_types["float"] > 50
        assert {spec.dtype for spec in engine.outputs} == {"float32"}, "what is answered keeps its type"
        assert engine.kept["LayerNormalization"] == 13 and engine.kept["Softmax"] == 6
        assert engine.low["MatMul"] == 48 and "MatMul" not in engine.kept
        assert engine.error_limit == 2 * coarser * bundle.manifest.reference.noise
        if precision == "fp16":
            assert engine.graph_error is not None
            assert 100 * bundle.manifest.reference.noise < engine.graph_error <= engine.error_limit
        else:  # ONNX Runtime has no kernels for it on the CPU, and that is said
            assert engine.graph_error is None
            assert "was not held against the reference" in compiled.warnings[0]

    def test_int8_loses_less_than_half_of_the_adapter(self, bundle: Bundle) -> None:
        compiled = compile_bundle(bundle, RTX, precision="int8")
        engine = compiled.engine
        assert engine.name == "tensorrt-rtx-int8"
        # products and their Q/DQ
        assert engine.layer_types["int8"] >= 2 * sum(engine.low.values()) > 20
        assert engine.graph_error is not None
        assert 1000 * bundle.manifest.reference.noise < engine.graph_error <= engine.error_limit < 1


class TestProof:
    def test_a_wrong_graph_is_not_built(self, adapters, tmp_path: Path) -> None:
        made = export(adapters["vefa"], tmp_path / "bundle", optimize="none").bundle
        graph = load_graph(made.graph).clone()
        name = max(graph.graph.initializers, key=lambda n: graph.graph.initializers[n].const_value.nbytes)
        value = graph.graph.initializers[name]
        swapped = np.array(value.const_value.numpy())
        swapped[[100, 2003]] = swapped[[2003, 100]]  # two tokens' embeddings
        import onnx_ir as ir

        value.const_value = ir.tensor(swapped, name=name)
        other = tmp_path / "other"
        other.mkdir()
        save_graph(graph, other)
        for file in ("model.onnx", "model.onnx.data"):
            shutil.copyfile(other / file, made.path / file)
        files = {**made.manifest.files, **{f: sha256_file(made.path / f) for f in ("model.onnx", "model.onnx.data")}}
        import msgspec

        write_manifest(made.path, msgspec.structs.replace(made.manifest, files=files))
        with pytest.raises(RuntimeTargetError, match=r"in fp32 the graph differs from the reference by .*, and may by"):
            compile_bundle(Bundle.open(made.path), RTX)
        assert not (made.path / "engines").exists()

    def test_an_engine_that_was_changed_is_not_loaded(self, bundle: Bundle) -> None:
        engine = compile_bundle(bundle, RTX).engine
        file = bundle.path / engine.file
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        message = r"sha256 differs\) and is not loaded; build it again: deployfa compile .* --force"
        with pytest.raises(BundleError, match=message):
            open_engine(Bundle.open(bundle.path), RTX)
        file.unlink()
        with pytest.raises(BundleError, match=r"is missing and is not loaded; build it again"):
            open_engine(Bundle.open(bundle.path), RTX)
        # the graph runs all the same, and what the message says to type works
        assert Predictor(Bundle.open(bundle.path)).logits(["A joy."]).shape == (1, 2)
        again = compile_bundle(Bundle.open(bundle.path), RTX, force=True).engine
        assert read_engine(Bundle.open(bundle.path), again) and again.sha256 == engine.sha256

    def test_an_engine_outside_is_refused(self, bundle: Bundle) -> None:
        import msgspec

        engine = compile_bundle(bundle, RTX).engine
        outside = bundle.path.parent / "engine"
        shutil.copyfile(bundle.path / engine.file, outside)
        with pytest.raises(BundleError, match="lies outside the bundle; refused"):
            read_engine(bundle, msgspec.structs.replace(engine, file="../engine"))

    def test_without_a_gpu_one_line_says_so(self, bundle: Bundle) -> None:
        compile_bundle(bundle, RTX)
        from deployfa.runtimes.tensorrt.device import Device

        try:
            Device()
        except RuntimeTargetError:
            with pytest.raises(RuntimeTargetError, match=r"no NVIDIA GPU to run an engine on .*onnxruntime-cpu"):
                open_engine(bundle, RTX)
        else:
            with open_engine(bundle, RTX) as runner:
                assert runner.outputs[0].name == "logits"


class TestRefusals:
    """Each one clear line, and the bundle as it was."""

    @pytest.fixture(autouse=True)
    def unchanged(self, bundle: Bundle):
        before = {path.name: path.read_bytes() for path in bundle.path.iterdir() if path.stat().st_size < 1e6}
        yield
        assert {path.name: path.read_bytes() for path in bundle.path.iterdir() if path.stat().st_size < 1e6} == before
        assert not (bundle.path / "engines").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"profile": {"bach": Sizes(1, 1, 1)}},
                "no dimension 'bach'; dynamic dimensions of this graph: batch, seq",
            ),
            ({"profile": {"sequence": Sizes(1, 2, 513)}}, "longer than the bundle's model reads; it cuts texts at 512"),
            ({"precision": "fp8"}, "no precision 'fp8'; precisions: fp32"),
        ],
    )
    def test_options(self, bundle: Bundle, options: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            compile_bundle(bundle, RTX, **options)

    def test_another_target(self, bundle: Bundle) -> None:
        with pytest.raises(InputError, match="no target 'onnxruntime-cpu' to compile for; targets: tensorrt"):
            compile_bundle(bundle, "onnxruntime-cpu")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"compute_capabilities": ["9.0"]}, r"does not build for compute capability 9.0; pick from: 7.5, 8.0"),
            (
                {"compute_capabilities": ["7.5"]},
                r"node 'node_MatMul_\d+' \(MatMul, module 'bert\.encoder\.layer\.\d\..*FP32 GEMM.*; build fl",
            ),
            ({"workspace_bytes": 2**20}, "OutOfMemory.*; leave out --workspace, or give it more"),
        ],
    )
    def test_what_the_builder_refuses(self, bundle: Bundle, options: dict, message: str) -> None:
        with pytest.raises(RuntimeTargetError, match=message):
            compile_bundle(bundle, RTX, **options)

    def test_a_refit_without_a_gpu(self, bundle: Bundle) -> None:
        if shutil.which("nvidia-smi"):
            pytest.skip("there may be a GPU here, which builds it")
        with pytest.raises(RuntimeTargetError, match="--refit needs the GPU that the engine is for"):
            compile_bundle(bundle, RTX, refit=True, compute_capabilities=["8.9"])

    def test_a_library_that_is_not_here(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        from deployfa.runtimes.tensorrt import library

        monkeypatch.setitem(library._MODULES, "tensorrt", ("tensorrt_of_nobody",))
        with pytest.raises(MissingExtraError, match=r"run: pip install 'deployfa\[tensorrt\]'"):
            compile_bundle(bundle, "tensorrt")

    def test_ctrl_c_leaves_nothing(self, bundle: Bundle) -> None:
        command = [sys.executable, "-m", "deployfa.cli", "compile", str(bundle.path), "--level", "5"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            if "building for" in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
        assert process.returncode == 130, rest
        assert "Traceback" not in rest
        listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert f"{bundle.path}/engines" not in listed, "the builder's process is gone"

    def test_a_builder_that_crashes_is_one_line(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        from deployfa.runtimes.tensorrt import process

        class Crashing(subprocess.Popen):
            def __init__(self, *arguments, **options) -> None:
                super().__init__(*arguments, **options)
                os.kill(self.pid, signal.SIGSEGV)

        monkeypatch.setattr(process.subprocess, "Popen", Crashing)
        with pytest.raises(RuntimeTargetError, match=r"crashed while it built the engine \(SIGSEGV"):
            compile_bundle(bundle, RTX)


def test_an_engine_that_exists(bundle: Bundle) -> None:
    first = compile_bundle(bundle, RTX).engine
    with pytest.raises(OutputExistsError, match=r"pass --force to replace it$"):
        compile_bundle(bundle, RTX)
    second = compile_bundle(bundle, RTX, profile={"batch": Sizes(1, 1, 1)}, force=True).engine
    assert second.file != first.file
    assert [path.name for path in (bundle.path / "engines").iterdir()] == [Path(second.file).name]
    assert Bundle.open(bundle.path).manifest.engines == [second]


def test_a_full_disk(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A real one: 20 MB free beside the bundle, for an engine of 96."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in bundles["folded"].iterdir()) // 2**20 + 21
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    try:
        there = Bundle.open(shutil.copytree(bundles["folded"], disk / "folded"))
        before = sorted(path.name for path in there.path.iterdir())
        with pytest.raises(StorageError, match=r"no space left to write '.*engines/tensorrt-rtx-fp32"):
            compile_bundle(there, RTX)
        assert sorted(path.name for path in there.path.iterdir()) == before
        assert Bundle.open(there.path).manifest.engines == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
