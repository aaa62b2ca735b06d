"""The wheel in an environment with the ``cpu`` extra and nothing else: what a device has."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run away from the repository, so that only what is installed can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_nothing_heavy_is_installed(clean_venv: Path, tmp_path: Path) -> None:
    names = ("torch", "transformers", "peft", "onnxscript")
    code = f"import importlib.util as u; print(*[name for name in {names} if u.find_spec(name)])"
    result = run(clean_venv, tmp_path, "-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_every_module_but_training_and_serving_imports(clean_venv: Path, tmp_path: Path) -> None:
    names = []
    for package, folder in (("deployfa", "deployfa"), ("deployfa.cli", "cli"), ("deployfa.models", "models")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            names.append(".".join((package, *parts)).removesuffix(".__init__"))
    needing_more = ("deployfa.training", "deployfa.serving")
    names = [name for name in names if not name.startswith(needing_more) and not name.endswith(".__main__")]
    assert {"deployfa.adapter.formats", "deployfa.cli", "deployfa.models"} <= set(names)
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    result = run(clean_venv, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    files = result.stdout.splitlines()
    assert len(files) == len(names)
    assert all("site-packages" in file for file in files)


def test_help(clean_venv: Path, tmp_path: Path) -> None:
    result = run(clean_venv.with_name("deployfa"), tmp_path, "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_a_device_places_runs_verifies_and_benches_without_torch(
    clean_venv: Path, trained: dict[str, Path], bundles: dict[str, Path], tmp_path: Path
) -> None:
    """The base graph is in the cache, as a device would have it; every step after it works with the ``cpu`` extra."""
    assert bundles["folded"].is_dir()
    deployfa = clean_venv.with_name("deployfa")
    exported = run(deployfa, tmp_path, "export", "-a", str(trained["vefa"]), "-o", "b", "--shapes", "1x8")
    assert exported.returncode == 0, exported.stderr
    assert "onnxscript, which is not installed" in " ".join(exported.stdout.split())
    for command in (
        ["inspect", str(trained["vefa"])],
        ["plan", "-a", str(trained["vefa"])],
        ["verify", "b", "--no-torch"],
        ["verify", "b"],
        ["run", "b", "--text", "A joy from start to finish."],
        ["bench", "b", "--against", "base", "--shapes", "1x8", "--samples", "11", "--max-seconds", "2"],
    ):
        result = run(deployfa, tmp_path, *command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"


@pytest.mark.parametrize("words", [("serve", "x.bundle"), ("load", "http://localhost:1", "--rate", "1")])
def test_serving_and_loading_say_which_extra(clean_venv: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    result = run(clean_venv.with_name("deployfa"), tmp_path, *words)
    assert result.returncode == 2 and "pip install 'deployfa[serve]'" in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_needs_torch_says_which_extra(clean_venv: Path, small_data: dict[str, Path], tmp_path: Path) -> None:
    deployfa = clean_venv.with_name("deployfa")
    command = ["train", "--model", "m", "--train", str(small_data["movies_train"]), "--out", "a.pt"]
    result = run(deployfa, tmp_path, *command)
    assert result.returncode == 2
    assert "pip install 'deployfa[train]'" in result.stderr
    code = "from deployfa import VeFAConfig"
    result = run(clean_venv, tmp_path, "-c", code)
    assert "pip install 'deployfa[train]'" in result.stderr


def test_the_doctor_tells_a_device_what_it_lacks(clean_venv: Path, tmp_path: Path) -> None:
    result = run(clean_venv.with_name("deployfa"), tmp_path, "doctor", "--json")
    assert result.returncode == 0, result.stderr
    targets = {state["target"]: state for state in json.loads(result.stdout)["targets"]}
    assert targets["onnxruntime-cpu"]["run"] == {"yes": True, "reason": None, "install": None}
    assert targets["onnxruntime-cpu"]["build"]["install"] == "pip install 'deployfa[train]'"
    for target in ("tensorrt", "tensorrt-rtx"):
        assert targets[target]["build"]["install"] == f"pip install 'deployfa[{target}]'"
    assert targets["onnxruntime-tensorrt-rtx"]["run"]["install"] == "pip install 'deployfa[cpu,tensorrt-rtx]'"
