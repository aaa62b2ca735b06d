"""Who may import whom, and what a bare import must not load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")

HEAVY = ("torch", "transformers", "tensorrt", "tensorrt_rtx_bindings", "peft", "onnxscript", "accelerate")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources in the shape in which they install."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "deployfa", tmp_path / "deployfa", ignore=ignore)
    for name in ("cli", "models"):
        shutil.copytree(ROOT / name, tmp_path / "deployfa" / name, ignore=ignore)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [str(LINT_IMPORTS), "--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def light_import(tree: Path) -> tuple[list[str], list[str]]:
    """Import every module but training, which may import torch: their names, and the heavy ones that came along.

    The names come from the files: pkgutil.walk_packages would import training to look inside it.
    """
    paths = [path.relative_to(tree).with_suffix("") for path in sorted((tree / "deployfa").rglob("*.py"))]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    names = [name for name in names if not name.startswith("deployfa.training")]
    code = (
        "import importlib, sys\n"
        f"for name in {names}: assert importlib.import_module(name).__file__.startswith({str(tree)!r})\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return names, result.stdout.split()


def test_rooms_import_downwards_only(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("deployfa/edits.py", "import deployfa.graph", "deployfa.edits is not allowed to import deployfa.graph"),
        ("deployfa/errors.py", "import deployfa.cli", "deployfa.errors is not allowed to import deployfa.cli"),
        (
            "deployfa/graph/__init__.py",
            "import deployfa.training",
            "deployfa.graph is not allowed to import deployfa.t",
        ),
        ("deployfa/runtimes/__init__.py", "import deployfa.graph", "deployfa.runtimes is not allowed to import deploy"),
        ("deployfa/models/__init__.py", "import deployfa.cli", "deployfa.models is not allowed to import deployfa.cli"),
        ("deployfa/graph/__init__.py", "def f():\n    import torch", "deployfa.graph is not allowed to import torch"),
    ],
)
def test_a_planted_upward_import_is_found(tree: Path, module: str, line: str, complaint: str) -> None:
    path = tree / module
    path.write_text(f"{path.read_text()}\n{line}\n")
    result = lint(tree)
    assert result.returncode == 1, result.stdout
    assert complaint in result.stdout


def test_a_new_room_without_a_place_is_found(tree: Path) -> None:
    (tree / "deployfa" / "annex.py").touch()
    result = lint(tree)
    assert result.returncode == 1, result.stdout
    assert "annex" in result.stdout


def test_importing_everything_but_training_loads_no_framework(tree: Path) -> None:
    names, heavy = light_import(tree)
    assert heavy == []
    assert {"deployfa", "deployfa.cli", "deployfa.models", "deployfa.graph.plan", "deployfa.bundle"} <= set(names)


def test_a_planted_torch_import_is_found(tree: Path) -> None:
    path = tree / "deployfa" / "graph" / "__init__.py"
    path.write_text(f"{path.read_text()}\nimport torch\n")
    assert "torch" in light_import(tree)[1]
