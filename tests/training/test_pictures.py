"""Pictures end to end: train, export, verify, with tiny random models of every recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.errors import InputError
from deployfa.models import load_recipe
from deployfa.parity import verify
from deployfa.pipeline import export
from deployfa.predict import Predictor
from deployfa.train import train
from deployfa.training.base import load_base
from deployfa.training.frozen_statistics import freeze_statistics

from .tiny_pictures import PROCESSORS, save_pictures, save_tiny


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures") / "stripes.npz")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in PROCESSORS}


def fit(model: Path, pictures: Path, out: Path, recipe: str, **options: Any):
    chosen = load_recipe(recipe)
    given = {"method": "vefa", "learning_rate": 0.05, "epochs": 1, "batch_size": 12, "sites": chosen.sites, **options}
    return train(
        model=model,
        task="image-classification",
        train_file=pictures,
        eval_file=pictures,
        shifted_files={},
        out=out,
        options=given,
    )


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_train_export_verify(name: str, models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    report = fit(models[name], pictures, tmp_path / "vefa.pt", name)
    assert report.scores["eval"].rows == 24
    adapter = Adapter.load(tmp_path / "vefa.pt")
    assert adapter.labels == ("lying", "standing")
    assert adapter.base.task == "image-classification"
    assert all(edit.distance() > 0 for edit in adapter.edits.values())
    exported = export(adapter, tmp_path / "bundle", optimize="none")
    steps = exported.bundle.manifest.preprocessing.image
    assert steps is not None
    assert (steps.height, steps.width) == (32, 32)
    for use_torch in (True, False):
        found = verify(Bundle.open(tmp_path / "bundle"), use_torch=use_torch)
        assert found.passed, found.reason
        assert found.effect > 1e-4


def test_every_site_of_all_is_a_site(models: dict[str, Path]) -> None:
    import re

    for name, folder in models.items():
        recipe = load_recipe(name)
        base = load_base(folder, "image-classification", labels=["a", "b"])
        layers = {
            path for path, module in base.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        } - set(base.fresh_modules)
        some, more = (
            {path for path in layers if re.fullmatch(str(sites), path)} for sites in (recipe.sites, recipe.sites_all)
        )
        assert some
        assert some < more
        assert all("embed" in path for path in layers - more), layers - more


@pytest.mark.parametrize(("method", "name"), [("lorfa", "resnet"), ("lora", "resnet"), ("head", "dinov2")])
def test_other_methods(method: str, name: str, models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    fit(models[name], pictures, tmp_path / "a.pt", name, method=method, rank=2, learning_rate=0.01)
    exported = export(Adapter.load(tmp_path / "a.pt"), tmp_path / "bundle", optimize="none")
    assert verify(exported.bundle, use_torch=True).passed


def test_the_whole_model(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    fit(models["vit"], pictures, tmp_path / "full", "vit", method="full", learning_rate=1e-3)
    assert json.loads((tmp_path / "full" / "preprocessor_config.json").read_text()) == PROCESSORS["vit"]
    assert load_base(tmp_path / "full", "image-classification", labels=None).fresh_modules == ()


def test_running_statistics_stay_the_bases_own(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    base = load_base(models["resnet"], "image-classification", labels=["a", "b"])
    before = {name: value.clone() for name, value in base.model.named_buffers()}
    assert freeze_statistics(base.model) == 12
    base.model.train()
    pixels = torch.randn(4, 3, 32, 32)
    trained = base.model(pixels).logits
    assert all(torch.equal(before[name], value) for name, value in base.model.named_buffers())
    # and what is trained is what is deployed
    assert torch.equal(trained, base.model.eval()(pixels).logits)


def test_without_that_they_move(models: dict[str, Path]) -> None:
    model = load_base(models["resnet"], "image-classification", labels=["a", "b"]).model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, 3, 32, 32))
    assert not all(torch.equal(before[name], value) for name, value in model.named_buffers())


def test_bundle_answers_as_pytorch_does(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    report = fit(models["resnet"], pictures, tmp_path / "a.pt", "resnet", epochs=2)
    exported = export(Adapter.load(tmp_path / "a.pt"), tmp_path / "bundle", optimize="none")
    stored = np.load(pictures)
    answers = list(Predictor(exported.bundle).answer(list(stored["images"])))
    right = np.array([answer.label for answer in answers]) == stored["label_names"][stored["labels"]]
    assert right.mean() == report.scores["eval"].accuracy
    assert answers[1].image == "picture 2"


def test_other_steps_make_another_base_graph(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    fit(models["vit"], pictures, tmp_path / "a.pt", "vit")
    adapter = Adapter.load(tmp_path / "a.pt")
    first = export(adapter, tmp_path / "first", optimize="none")
    assert not export(adapter, tmp_path / "again", optimize="none").ran_torch
    file = models["vit"] / "preprocessor_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({**PROCESSORS["vit"], "image_mean": [0.1, 0.2, 0.3]}))
        second = export(adapter, tmp_path / "second", optimize="none")
    finally:
        file.write_text(before)
    assert second.ran_torch
    # and it is said, because the adapter was trained on others
    assert first.warnings == ()
    assert "trained on pictures prepared in another way" in second.warnings[0]
    steps = [exported.bundle.manifest.preprocessing.image for exported in (first, second)]
    assert [each.mean for each in steps if each is not None] == [(0.5, 0.5, 0.5), (0.1, 0.2, 0.3)]


def test_pixels_that_the_model_does_not_take(models: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    file = models["vit"] / "preprocessor_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({**PROCESSORS["vit"], "size": 64}))
        with pytest.raises(InputError, match=r"takes 32 x 32 pixels, but .* 64 x 64; make the two the same"):
            fit(models["vit"], pictures, tmp_path / "a.pt", "vit")
        file.unlink()
        with pytest.raises(InputError, match="has no preprocessor_config"):
            fit(models["vit"], pictures, tmp_path / "a.pt", "vit")
    finally:
        file.write_text(before)
