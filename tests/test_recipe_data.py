"""A recipe that brings its data needs nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployfa.errors import InputError
from deployfa.models import load_recipe, recipe_names
from deployfa.recipe import Data
from deployfa.recipe_data import own_rows
from deployfa.task_rows import rows_of
from deployfa.tasks import task_of


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, with the assets that the shared one has."""
    from deployfa.assets import fetch
    from deployfa.cache import cache_dir

    for name in ("vader", "mnist-5k"):
        fetch(name)
    shared = cache_dir()
    monkeypatch.setenv("DEPLOYFA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "assets").symlink_to(shared / "assets")
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "task", "shifted"),
    [("vader", "text-classification", {"amazon", "nyt", "tweets"}), ("digits", "image-classification", {"digits"})],
)
def test_rows_to_train_on_to_test_on_and_of_other_domains(cache: Path, name: str, task: str, shifted: set[str]) -> None:
    found = own_rows(Data(name, train_rows=60, test_rows=20))  # type: ignore[arg-type]
    assert found.train.is_relative_to(cache)
    assert len(rows_of(task_of(task), found.train)) == 60
    assert set(found.shifted) == shifted
    for file in (found.test, *found.shifted.values()):
        rows = rows_of(task_of(task), file)
        assert len(rows) == 20
        assert all(row.label for row in rows)
    written = found.train.stat().st_mtime_ns
    assert own_rows(Data(name, train_rows=60, test_rows=20)).train.stat().st_mtime_ns == written  # type: ignore[arg-type]
    assert own_rows(Data(name, train_rows=50, test_rows=20)).train != found.train  # type: ignore[arg-type]


def test_what_cannot_be_prepared_leaves_nothing(cache: Path) -> None:
    with pytest.raises(InputError, match="leave none for the test"):
        own_rows(Data("digits", train_rows=5000, test_rows=20))
    assert not [path for path in (cache / "data").iterdir() if path.is_dir()]


def test_a_model_with_data_for_each_task() -> None:
    complete = {recipe.task for recipe in map(load_recipe, recipe_names()) if recipe.asset and recipe.data}
    assert complete == {"text-classification", "image-classification", "text-generation"}


def test_a_recipe_without_data_says_what_to_pass(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deployfa.cli", "train", "--recipe", "bert", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "pass --train FILE, or a --recipe that brings some" in done.stderr
    assert not list(tmp_path.iterdir())
