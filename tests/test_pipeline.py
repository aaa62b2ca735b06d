"""Export: what lands in a bundle, what does not change, what a killed export leaves."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.edits import Edit
from deployfa.errors import BundleError, InputError, LeftoverError, OutputExistsError, SiteError
from deployfa.pipeline import export, plan_adapter


def _hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_bundle_holds_what_a_device_needs(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["folded"])
    names = {path.name for path in bundle.path.iterdir()}
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "adapter.safetensors", "reference.safetensors"} <= names
    manifest = bundle.manifest
    assert set(manifest.files) == names - {"manifest.json"}
    assert manifest.labels == ["negative", "positive"]
    assert next((t.name, t.shape) for t in manifest.graph.inputs) == ("input_ids", ["batch", "sequence"])
    assert {t.name for t in manifest.graph.inputs} == {"input_ids", "attention_mask", "token_type_ids"}
    assert manifest.base.fingerprint is not None
    assert manifest.base.fingerprint.startswith("sha256:")
    assert manifest.versions["onnxruntime"]
    assert len(manifest.plan["edits"]) == 36


def test_no_path_of_this_machine_is_in_the_graph(bundles: dict[str, Path]) -> None:
    content = (bundles["folded"] / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(Path.home()).encode() not in content


def test_the_adapter_in_the_bundle_is_the_one_exported(bundles: dict[str, Path], trained: dict[str, Path]) -> None:
    inside, outside = Adapter.load(bundles["folded"] / "adapter.safetensors"), Adapter.load(trained["vefa"])
    assert inside.meta == outside.meta
    assert inside.tensors().keys() == outside.tensors().keys()
    assert all(np.array_equal(inside.tensors()[name], array) for name, array in outside.tensors().items())


def test_export_changes_neither_the_adapter_nor_the_cached_base(trained: dict[str, Path], tmp_path: Path) -> None:
    adapter = Adapter.load(trained["vefa"])
    before = {name: array.copy() for name, array in adapter.tensors().items()}
    _, base = plan_adapter(adapter)
    cached = _hashes(base.folder)
    export(adapter, tmp_path / "out", optimize="none")
    assert all(np.array_equal(array, before[name]) for name, array in adapter.tensors().items())
    assert _hashes(base.folder) == cached


@pytest.mark.parametrize("method", ["lorfa", "lora", "head"])
def test_every_method_exports(method: str, trained: dict[str, Path], tmp_path: Path) -> None:
    exported = export(Adapter.load(trained[method]), tmp_path / method, optimize="none")
    assert exported.plan.count("side op") == 0
    assert len(exported.plan.edits) == (0 if method == "head" else 36)


def test_the_second_export_runs_no_torch(trained: dict[str, Path], bundles: dict[str, Path], tmp_path: Path) -> None:
    assert bundles["folded"].is_dir()  # the base graph is in the cache
    code = (
        "import sys; from pathlib import Path\n"
        "from deployfa.adapter import Adapter; from deployfa.pipeline import export\n"
        f"done = export(Adapter.load({str(trained['vefa'])!r}), Path({str(tmp_path / 'b')!r}), optimize='none')\n"
        "print(done.ran_torch, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_an_existing_output_is_kept_without_force(bundles: dict[str, Path], trained: dict[str, Path]) -> None:
    before = _hashes(bundles["folded"])
    with pytest.raises(OutputExistsError, match="--force"):
        export(Adapter.load(trained["vefa"]), bundles["folded"])
    assert _hashes(bundles["folded"]) == before


def test_a_site_the_graph_lacks_is_named(trained: dict[str, Path], tmp_path: Path) -> None:
    adapter = Adapter.load(trained["vefa"])
    edits = {**adapter.edits, "bert.encoder.layer.6.output.dense": Edit(lam=np.ones(1536, np.float32))}
    wrong = _with_edits(adapter, edits)
    with pytest.raises(SiteError, match=r"bert\.encoder\.layer\.6\.output\.dense.*sites in this graph: bert\."):
        export(wrong, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_trained_adapter_that_changes_nothing_is_an_error(trained: dict[str, Path], tmp_path: Path) -> None:
    """λ so small that float32 cannot see it: the file says trained, the model does not change."""
    adapter = Adapter.load(trained["vefa"])
    edits = {
        site: Edit(lam=np.full_like(edit.lam, 1e-12)) for site, edit in adapter.edits.items() if edit.lam is not None
    }
    with pytest.raises(LeftoverError, match="nothing was written"):
        export(_with_edits(adapter, edits), tmp_path / "out", optimize="none")
    assert list(tmp_path.iterdir()) == []


def test_unknown_target_and_fusion_are_refused_before_work(trained: dict[str, Path], tmp_path: Path) -> None:
    adapter = Adapter.load(trained["vefa"])
    with pytest.raises(InputError, match="targets: onnxruntime-cpu"):
        export(adapter, tmp_path / "out", target="abacus")
    with pytest.raises(InputError, match="use auto or one of"):
        export(adapter, tmp_path / "out", optimize="magic")


def test_auto_times_fusions_and_records_them(trained: dict[str, Path], tmp_path: Path) -> None:
    from deployfa.bench import Shape

    done = export(Adapter.load(trained["vefa"]), tmp_path / "auto", shapes=[Shape(1, 8)])
    record = done.bundle.manifest.optimization
    assert {candidate.name for candidate in record.tried} == {"none", "ort", "ort-sum", "onnxscript"}
    timed = [candidate for candidate in record.tried if candidate.refused is None]
    assert len(timed) >= 2
    assert all(candidate.median_ms["1x8"] > 0 and candidate.error is not None for candidate in timed)
    assert record.chosen in {candidate.name for candidate in timed}


def test_the_manifest_tells_which_fusions_the_adapter_keeps(bundles: dict[str, Path]) -> None:
    folded, beside = (Bundle.open(bundles[name]).manifest.fusions for name in ("folded", "side-op"))
    assert folded is not None and beside is not None
    assert folded.keys() == beside.keys()
    assert all(count.adapted == count.base for count in folded.values())
    assert {name for name, count in beside.items() if count.adapted < count.base} == {"packed MatMul (3 in 1)"}


def test_a_manifest_from_before_fusions_were_counted_still_opens(bundles: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundles["folded"], tmp_path / "copy"))
    manifest = msgspec.json.decode((copy / "manifest.json").read_bytes())
    del manifest["fusions"]
    (copy / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    assert Bundle.open(copy).manifest.fusions is None


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_and_the_next_one_sweeps(trained: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-m", "deployfa.cli", "export", "-a", str(trained["vefa"]), "-o", str(out)]
    process = subprocess.Popen([*command, "--optimize", "none"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(tmp_path.glob(".bundle.partial-*")):
        assert time.monotonic() < deadline, "the export never started to write"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if out.exists():
        pytest.skip("the export finished before it could be killed")  # a race that this machine won
    assert list(tmp_path.glob(".bundle.partial-*"))
    export(Adapter.load(trained["vefa"]), out, optimize="none")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


class TestOpen:
    @pytest.fixture
    def copy(self, bundles: dict[str, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(bundles["folded"], tmp_path / "copy"))

    def test_a_changed_file_is_refused(self, copy: Path) -> None:
        with (copy / "model.onnx.data").open("r+b") as stream:
            stream.seek(1000)
            byte = stream.read(1)
            stream.seek(1000)
            stream.write(bytes([byte[0] ^ 1]))
        with pytest.raises(BundleError, match="sha256 differs"):
            Bundle.open(copy)

    def test_a_missing_file_is_named(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        with pytest.raises(BundleError, match=r"lacks 'tokenizer\.json'"):
            Bundle.open(copy)

    def test_a_path_out_of_the_bundle_is_refused(self, copy: Path) -> None:
        (copy.parent / "secret").write_text("x")
        manifest = msgspec.json.decode((copy / "manifest.json").read_bytes())
        manifest["files"]["../secret"] = hashlib.sha256(b"x").hexdigest()
        (copy / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        with pytest.raises(BundleError, match="outside the bundle"):
            Bundle.open(copy)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 3}'])
    def test_a_broken_manifest_is_one_clear_error(self, copy: Path, content: bytes) -> None:
        (copy / "manifest.json").write_bytes(content)
        with pytest.raises(BundleError, match="broken"):
            Bundle.open(copy)

    def test_another_format_is_refused(self, copy: Path) -> None:
        text = (copy / "manifest.json").read_text().replace("deployfa-bundle/1", "deployfa-bundle/9")
        (copy / "manifest.json").write_text(text)
        with pytest.raises(BundleError, match="deployfa-bundle/9"):
            Bundle.open(copy)

    def test_a_hard_link_out_of_the_bundle_cannot_bring_other_bytes(self, copy: Path) -> None:
        """ONNX Runtime follows hard links in external data; the hash does not care where the bytes come from."""
        other = copy.parent / "other.data"
        other.write_bytes(b"\0" * (copy / "model.onnx.data").stat().st_size)
        (copy / "model.onnx.data").unlink()
        os.link(other, copy / "model.onnx.data")
        with pytest.raises(BundleError, match="sha256 differs"):
            Bundle.open(copy)


def _with_edits(adapter: Adapter, edits: dict[str, Edit]) -> Adapter:
    """The adapter with other edits."""
    import dataclasses

    return dataclasses.replace(adapter, edits=edits)
