"""Bad input: one clear line on standard error, exit status 2, nothing lost and nothing half-written."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit


def assert_one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit status 2 and exactly one ``error:`` line, with every part in it and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("·")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def other_base(shared: Path, minilm_dir: Path) -> Path:
    """MiniLM with one number changed: same architecture, same names, same shapes."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    folder = shared / "other-base"
    if not folder.is_dir():
        partial = Path(shutil.copytree(minilm_dir, folder.with_name(f"other-base.{os.getpid()}")))
        weights = load_file(partial / "model.safetensors")
        weights["encoder.layer.0.output.dense.bias"][0] += 1.0
        with safe_open(minilm_dir / "model.safetensors", "numpy") as handle:
            save_file(weights, partial / "model.safetensors", metadata=handle.metadata())
        try:
            partial.rename(folder)
        except OSError:
            shutil.rmtree(partial)  # another worker was faster
    return folder


class TestAdapterFiles:
    def test_missing(self, cli, tmp_path: Path) -> None:
        assert_one_line(cli("inspect", tmp_path / "no.pt"), "no adapter at", "no.pt")

    def test_truncated_pt(self, cli, trained: dict[str, Path], tmp_path: Path) -> None:
        content = trained["vefa"].read_bytes()
        (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
        assert_one_line(cli("export", "-a", tmp_path / "cut.pt"), "truncated", "copy it again")
        assert [path.name for path in tmp_path.iterdir()] == ["cut.pt"]

    def test_a_pickle_that_is_not_tensors_runs_nothing(self, cli, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path / 'owned'}",)

        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("evil/data.pkl", pickle.dumps(Evil(), protocol=2))
        (tmp_path / "evil.pt").write_bytes(stream.getvalue())
        assert_one_line(cli("inspect", tmp_path / "evil.pt"), "adapters are data, never code")
        assert not (tmp_path / "owned").exists()

    def test_another_torch_file(self, cli, tmp_path: Path) -> None:
        import torch

        torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
        assert_one_line(cli("inspect", tmp_path / "other.pt"), "not a deployfa adapter")

    def test_a_site_the_graph_lacks(self, cli, trained: dict[str, Path], tmp_path: Path) -> None:
        adapter = Adapter.load(trained["vefa"])
        edits = {**adapter.edits, "bert.encoder.layer.9.output.dense": Edit(lam=np.ones(1536, np.float32))}
        dataclasses.replace(adapter, edits=edits).save(tmp_path / "more.safetensors")
        result = cli("plan", "-a", tmp_path / "more.safetensors")
        assert_one_line(result, "'bert.encoder.layer.9.output.dense' not found", "sites in this graph: bert.encoder")

    def test_a_site_of_another_width(self, cli, trained: dict[str, Path], tmp_path: Path) -> None:
        adapter = Adapter.load(trained["vefa"])
        site = next(iter(adapter.edits))
        edits = {**adapter.edits, site: Edit(lam=np.ones(7, np.float32))}
        dataclasses.replace(adapter, edits=edits).save(tmp_path / "narrow.safetensors")
        assert_one_line(cli("plan", "-a", tmp_path / "narrow.safetensors"), "shape (7,)", "in_features 384")


class TestAnotherBase:
    def test_it_is_refused_by_fingerprint(
        self, cli, trained: dict[str, Path], other_base: Path, tmp_path: Path
    ) -> None:
        result = cli("export", "-a", trained["vefa"], "-m", other_base, "-o", tmp_path / "b")
        assert_one_line(result, "was trained on base", "but this base is", "--allow-base-mismatch")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_the_override_is_loud(self, cli, trained: dict[str, Path], other_base: Path, tmp_path: Path) -> None:
        out = tmp_path / "b"
        command = ["export", "-a", trained["vefa"], "-m", other_base, "-o", out, "--optimize", "none"]
        result = cli(*command, "--allow-base-mismatch")
        assert result.returncode == 0, result.stderr
        assert "warning: the adapter was trained on base" in result.stderr
        assert "going on because of --allow-base-mismatch" in (out / "manifest.json").read_text()


class TestData:
    def train(self, cli, tmp_path: Path, model: Path, **files: Path) -> subprocess.CompletedProcess[str]:
        options = [part for name, path in files.items() for part in (f"--{name}", path)]
        return cli("train", "--recipe", "minilm", "--model", model, *options, "--out", tmp_path / "a.pt")

    def test_missing_file(self, cli, tmp_path: Path, minilm_dir: Path) -> None:
        assert_one_line(self.train(cli, tmp_path, minilm_dir, train=tmp_path / "no.csv"), "no.csv")

    def test_without_the_columns(self, cli, tmp_path: Path, minilm_dir: Path) -> None:
        (tmp_path / "t.csv").write_text("sentence,score\ngood,1\n")
        result = self.train(cli, tmp_path, minilm_dir, train=tmp_path / "t.csv")
        assert_one_line(result, "t.csv", "text", "sentence")

    @pytest.mark.parametrize("content", ["", "text,label\n"])
    def test_empty(self, cli, tmp_path: Path, minilm_dir: Path, content: str) -> None:
        (tmp_path / "t.csv").write_text(content)
        assert_one_line(self.train(cli, tmp_path, minilm_dir, train=tmp_path / "t.csv"), "t.csv")

    def test_a_label_unseen_in_training(self, cli, tmp_path: Path, minilm_dir: Path) -> None:
        (tmp_path / "t.csv").write_text("text,label\ngood,yes\nbad,no\n")
        (tmp_path / "e.csv").write_text("text,label\ngood,yes\nhm,perhaps\n")
        result = self.train(cli, tmp_path, minilm_dir, train=tmp_path / "t.csv", eval=tmp_path / "e.csv")
        assert_one_line(result, "perhaps", "no, yes")
        assert not (tmp_path / "a.pt").exists()

    def test_a_pair_without_a_name(self, cli, small_data: dict[str, Path], tmp_path: Path) -> None:
        command = ["train", "--recipe", "minilm", "--train", small_data["movies_train"], "--ood", "tweets.csv"]
        assert_one_line(cli(*command, "-o", tmp_path / "a.pt"), "is not NAME=FILE")

    def test_no_model_and_no_recipe(self, cli, small_data: dict[str, Path], tmp_path: Path) -> None:
        result = cli("train", "--train", small_data["movies_train"], "-o", tmp_path / "a.pt")
        assert_one_line(result, "no base model", "--recipe minilm")

    def test_a_model_that_is_not_there(self, cli, small_data: dict[str, Path], tmp_path: Path) -> None:
        command = ["train", "-m", tmp_path / "nowhere", "--train", small_data["movies_train"]]
        assert_one_line(cli(*command, "-o", tmp_path / "a.pt"), "nowhere")


class TestOutputs:
    def test_an_adapter_that_exists(self, cli, trained: dict[str, Path], small_data: dict[str, Path]) -> None:
        before = trained["vefa"].read_bytes()
        command = ["train", "--recipe", "minilm", "--train", small_data["movies_train"], "-o", trained["vefa"]]
        assert_one_line(cli(*command), "exists", "--force")
        assert trained["vefa"].read_bytes() == before

    def test_a_bundle_that_exists(self, cli, trained: dict[str, Path], bundles: dict[str, Path]) -> None:
        before = hashes(bundles["folded"])
        assert_one_line(cli("export", "-a", trained["vefa"], "-o", bundles["folded"]), "exists", "--force")
        assert hashes(bundles["folded"]) == before

    def test_no_space_left(self, cli, trained: dict[str, Path], tmp_path: Path) -> None:
        """A real full disk: a tmpfs of 20 MB for a bundle of 90 MB."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
        try:
            (disk / "kept").write_text("kept")
            result = cli("export", "-a", trained["vefa"], "-o", disk / "bundle", "--optimize", "none")
            assert_one_line(result, "no space left to write", "bundle")
            assert [path.name for path in disk.iterdir()] == ["kept"]
            assert (disk / "kept").read_text() == "kept"
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def test_nothing_to_answer(self, cli, bundles: dict[str, Path]) -> None:
        assert_one_line(cli("run", bundles["folded"]), "nothing to answer", "--text")


class TestBundles:
    @pytest.mark.parametrize("command", ["verify", "bench"])
    def test_not_a_bundle(self, cli, command: str, tmp_path: Path) -> None:
        assert_one_line(cli(command, tmp_path), "is not a bundle", "deployfa export")

    def test_a_shape_that_is_none(self, cli, bundles: dict[str, Path]) -> None:
        assert_one_line(cli("bench", bundles["folded"], "--shapes", "8by128"), "is not a shape", "8x128")

    def test_against_something_unknown(self, cli, bundles: dict[str, Path]) -> None:
        assert_one_line(cli("bench", bundles["folded"], "--against", "vllm"), "--against knows base, torch")

    def test_a_fold_that_was_required_and_refused(self, cli, trained: dict[str, Path]) -> None:
        result = cli("plan", "-a", trained["vefa"], "--placement", "side-op", "--require-fold")
        assert_one_line(result, "cannot fold", "drop --require-fold")


def test_without_onnxruntime_the_extra_is_named(cli, bundles: dict[str, Path], tmp_path: Path) -> None:
    """An import that fails, as on a machine without the package."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'onnxruntime':\n"
        "            raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    result = cli("run", bundles["folded"], "--text", "hello", env={"PYTHONPATH": str(tmp_path)})
    assert_one_line(result, "onnxruntime", "pip install 'deployfa[cpu]'")


def test_usage_errors_exit_2_too(cli) -> None:
    result = cli("export")
    assert result.returncode == 2
    assert "--adapter" in result.stderr


def test_a_closed_pipe_is_not_an_error(bundles: dict[str, Path]) -> None:
    command = f"{sys.executable} -m deployfa.cli run {bundles['folded']} {'--text hello ' * 50} | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_patch_is_refused(cli, bundles: dict[str, Path], tmp_path: Path) -> None:
    for command in (["run", bundles["folded"], "-t", "x"], ["verify", bundles["folded"]]):
        result = cli(*command, "--patch", bundles["folded"] / "adapter.safetensors")
        assert_one_line(result, "is not a patch", "export --delta")
        assert_one_line(cli(*command, "--patch", tmp_path / "absent.patch"), "no patch at")


def test_a_patch_cannot_hold_a_side_op(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    command = ["export", "-a", trained["vefa"], "--delta", tmp_path / "f", "-o", tmp_path / "p"]
    assert_one_line(cli(*command, "--placement", "side-op"), "needs a side op", "without --delta")
    assert list(tmp_path.iterdir()) == []
