"""``--json``: one document on standard output that fits its published schema."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from deployfa.bench import BenchReport
from deployfa.bundle import Manifest
from deployfa.bundle.manifest import FusedCount
from deployfa.cli.export import ExportReport
from deployfa.cli.export_patch import DeltaReport
from deployfa.cli.fetch import Fetched
from deployfa.cli.models import ListedRecipe
from deployfa.graph import Plan
from deployfa.inspection import Inspection
from deployfa.kept_fusions import PlanFusions
from deployfa.parity import ParityReport
from deployfa.predict import RunReport
from deployfa.train import TrainReport


def check(text: str, kind: Any) -> Any:
    """Parse ``text`` and hold it against the schema of ``kind``; a changed copy must not fit."""
    document = json.loads(text)
    schema = msgspec.json.schema(kind)
    jsonschema.validate(document, schema)
    broken = json.loads(text)
    target = broken[0] if isinstance(broken, list) else broken
    target[next(iter(target))] = {"not": "of that type"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
    return document


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["folded"], tmp_path / "folded"))


def test_inspect(cli, trained: dict[str, Path]) -> None:
    found = check(cli("inspect", trained["vefa"], "--json").stdout, Inspection)
    assert (len(found["sites"]), found["parameters"]) == (36, 20736)


def test_plan(cli, trained: dict[str, Path]) -> None:
    found = check(cli("plan", "-a", trained["vefa"], "--json").stdout, Plan)
    assert {edit["placement"] for edit in found["edits"]} == {"own weight"}
    assert found["fusions"] is None


def test_plan_with_side_ops_is_still_a_plan_and_tells_its_cost_in_fusions(cli, trained: dict[str, Path]) -> None:
    result = cli("plan", "-a", trained["vefa"], "--placement", "side-op", "--optimize", "ort", "--json")
    found = check(result.stdout, Plan)
    costs = msgspec.convert(found["fusions"], PlanFusions)
    assert costs.measured["ort"]["packed MatMul (3 in 1)"] == FusedCount(base=6, adapted=0)
    assert "the side ops cost fusions of the runtime: 6 of 6 packed MatMul" in result.stderr
    assert msgspec.json.decode(result.stdout, type=Plan).count("side op") == 36


def test_export(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    result = cli("export", "-a", trained["vefa"], "-o", tmp_path / "b", "--optimize", "none", "--json")
    found = check(result.stdout, ExportReport)
    jsonschema.validate(found["manifest"], msgspec.json.schema(Manifest))
    assert Path(found["bundle"]).is_dir()
    assert found["manifest"]["fusions"]["com.microsoft::BiasGelu"] == {"base": 6, "adapted": 6}
    assert found["warnings"] == []


def test_delta_run_and_verify(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    command = ["export", "-a", trained["vefa"], "--delta", "fleet.bundle", "-o", "vefa.patch", "--optimize", "none"]
    result = cli(*command, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = check(result.stdout, DeltaReport)
    assert (found["patch"], found["patch_bytes"]) == ("vefa.patch", (tmp_path / "vefa.patch").stat().st_size)
    assert found["wrote_bundle"] is True
    assert found["tensor_bytes"] == sum(4 * math.prod(shape) for shape in found["tensors"].values())
    assert 0 < found["share"] < 1 and found["error"] <= 2 * found["noise"]
    run = ["run", "fleet.bundle", "-t", "a joy", "--json"]
    with_patch = check(cli(*run, "--patch", "vefa.patch", cwd=tmp_path).stdout, RunReport)
    assert with_patch["patch"] == "vefa.patch"
    assert with_patch["answers"] != check(cli(*run, cwd=tmp_path).stdout, RunReport)["answers"]
    verified = cli("verify", "fleet.bundle", "--patch", "vefa.patch", "--no-torch", "--json", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert check(verified.stdout, ParityReport)["patch"] == "vefa.patch"
    manifest = msgspec.json.decode((tmp_path / "fleet.bundle" / "manifest.json").read_bytes(), type=Manifest)
    assert manifest.parity is None


def test_verify_and_its_summary_in_the_manifest(cli, bundle: Path) -> None:
    result = cli("verify", bundle, "--no-torch", "--json")
    assert result.returncode == 0, result.stderr
    assert check(result.stdout, ParityReport)["passed"] is True
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes(), type=Manifest)
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True


def test_bench_and_its_summary_in_the_manifest(cli, bundle: Path, tmp_path: Path) -> None:
    command = ["bench", bundle, "--against", "base", "--shapes", "1x8", "--samples", "11", "--launches", "2"]
    result = cli(*command, "--max-seconds", "3", "--samples-out", tmp_path / "raw.json", "--json")
    assert result.returncode == 0, result.stderr
    found = check(result.stdout, BenchReport)
    assert [contender["label"] for contender in found["contenders"]] == ["base", "folded"]
    assert json.loads((tmp_path / "raw.json").read_text())
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes(), type=Manifest)
    assert manifest.bench is not None
    assert manifest.bench["against"] == "base"
    assert "1x8 spinning off" in manifest.bench["shapes"]


def test_run(cli, bundle: Path) -> None:
    found = check(cli("run", bundle, "-t", "a joy", "-t", "a bore", "--json").stdout, RunReport)
    assert [answer["text"] for answer in found["answers"]] == ["a joy", "a bore"]
    assert all(sum(answer["scores"].values()) == pytest.approx(1) for answer in found["answers"])


def test_models(cli) -> None:
    found = check(cli("models", "--json").stdout, list[ListedRecipe])
    assert "minilm" in {recipe["name"] for recipe in found}


def test_fetch(cli, tmp_path: Path) -> None:
    found = check(cli("fetch", "vader", "-o", tmp_path / "data", "--json").stdout, Fetched)
    assert set(found["files"]) == {"movies_train", "movies_test", "tweets", "amazon", "nyt"}


@pytest.mark.slow
def test_train(cli, small_data: dict[str, Path], minilm_dir: Path, tmp_path: Path) -> None:
    command = [
        "train",
        "--recipe",
        "minilm",
        "-m",
        minilm_dir,
        "--train",
        small_data["movies_train"],
        "--epochs",
        "0.2",
    ]
    result = cli(*command, "--ood", f"nyt={small_data['nyt']}", "-o", tmp_path / "a.safetensors", "--json")
    assert result.returncode == 0, result.stderr
    assert set(check(result.stdout, TrainReport)["scores"]) == {"nyt"}
