"""The package list against the tree, and the wheel against the list."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# where each installed package lies in the repository
PLACES = {"deployfa": ROOT / "deployfa", "deployfa.cli": ROOT / "cli", "deployfa.models": ROOT / "models"}


def packages_in(places: dict[str, Path]) -> set[str]:
    found = set()
    for package, folder in places.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(folder).parts)))
    return found


def declared() -> list[str]:
    packages: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    return packages


def test_every_package_of_the_tree_is_declared() -> None:
    assert declared() == sorted(packages_in(PLACES))


def test_every_folder_with_sources_is_a_package() -> None:
    for folder in PLACES.values():
        for source in folder.rglob("*.py"):
            assert (source.parent / "__init__.py").is_file(), f"{source} would not be installed"


def test_packages_in_finds_a_forgotten_one(tmp_path: Path) -> None:
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "inner", tmp_path / "inner" / "deep"):
        (folder / "__init__.py").touch()
    assert packages_in({"deployfa.new": tmp_path}) == {"deployfa.new", "deployfa.new.inner", "deployfa.new.inner.deep"}


def test_wheel_holds_every_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    expected = {"deployfa/py.typed"}
    for package, folder in PLACES.items():
        for source in folder.rglob("*.py"):
            expected.add("/".join((*package.split("."), *source.relative_to(folder).parts)))
    assert {name for name in names if not name.startswith(info)} == expected
    assert "deployfa = deployfa.cli:main" in entry_points
    assert f"{info}/licenses/LICENSE" in names
    assert "Requires-Python: >=3.11" in metadata


@pytest.mark.parametrize("extra", [None, "cpu", "gpu", "report", "tensorrt", "tensorrt-rtx"])
def test_a_device_is_never_asked_to_install_torch(extra: str | None) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + (project["optional-dependencies"][extra] if extra else [])
    names = {requirement.split(">")[0].split("[")[0] for requirement in needed}
    assert names and not names & {"torch", "transformers", "peft", "accelerate", "onnxscript"}


def test_constraints_pin_every_requirement_to_an_allowed_version() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        name, _, version = line.partition("==")
        assert version and "+" not in version, f"{line}: a bare pin, which any index can serve"
        pins[canonicalize_name(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in (*project["dependencies"], *extras["all"], *extras["dev"])]
    for requirement in asked:
        if requirement.name == "deployfa":  # an extra that names others
            asked += [Requirement(text) for extra in requirement.extras for text in extras[extra]]
    named = {requirement.name for requirement in asked}
    assert {"torch", "onnxruntime", "matplotlib", "tensorrt-rtx-cu13-bindings"} <= named
    for requirement in asked:
        if requirement.name == "deployfa":
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_installed_in_place_from_anywhere(tmp_path: Path) -> None:
    """The editable install maps cli/ and models/; run outside the repository, where the path cannot help."""
    code = "import deployfa.cli, deployfa.models, deployfa; print(deployfa.cli.__file__, deployfa.models.__file__)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(ROOT / "cli" / "__init__.py"), str(ROOT / "models" / "__init__.py")]


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "-C", str(ROOT), "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"error: {old} is not Python 3.11 or newer" in result.stderr
    assert not (tmp_path / "venv").exists()
