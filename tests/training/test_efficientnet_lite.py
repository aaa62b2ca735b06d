"""EfficientNet-Lite0 with its real weights: the directory that is fetched, and digits through all commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from deployfa.adapter import Adapter
from deployfa.assets import fetch
from deployfa.base_models import base_model
from deployfa.bundle import Bundle
from deployfa.digits import prepare_digits
from deployfa.preprocess import ImagePreprocessor
from deployfa.preprocess.image_steps import read_steps
from deployfa.training.base import load_base


@pytest.fixture(scope="module")
def folder() -> Path:
    return base_model("efficientnet-lite0")


def test_the_same_network_as_the_packages(folder: Path) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    own = EfficientNet.from_name("efficientnet-lite0")
    own.load_state_dict(torch.load(fetch("efficientnet-lite0") / "efficientnet-lite0-57934424.pth", weights_only=True))
    ours = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(pixels).logits, own.eval()(pixels), rtol=1e-5, atol=1e-5)


def test_its_pictures_are_prepared_as_it_was_trained(folder: Path) -> None:
    """Two photographs that scikit-learn ships: a palace (698 in ImageNet) and a daisy (985)."""
    from sklearn.datasets import load_sample_images

    base = load_base(folder, "image-classification", labels=None)
    assert base.fresh_modules == ()
    pixels = ImagePreprocessor(read_steps(folder)).encode(load_sample_images().images)["pixel_values"]
    with torch.inference_mode():
        assert base.model(torch.from_numpy(pixels)).logits.argmax(-1).tolist() == [698, 985]


def test_another_number_of_labels_is_a_fresh_head(folder: Path) -> None:
    base = load_base(folder, "image-classification", labels=list("0123456789"))
    assert base.fresh_modules == ("classifier",)
    assert base.model(torch.zeros(1, 3, 224, 224)).logits.shape == (1, 10)


@pytest.mark.slow
def test_every_command(cli, tmp_path: Path) -> None:
    files = prepare_digits(tmp_path / "data", train_size=30, test_size=20)
    adapter, bundle = tmp_path / "vefa.pt", tmp_path / "digits.bundle"
    trained = cli(
        "train", "--recipe", "efficientnet_lite0", "--train", files["mnist_train"], "--eval", files["mnist_test"],
        "--ood", f"digits={files['digits']}", "--epochs", 1, "--batch-size", 10, "--out", adapter, "--json",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    report = json.loads(trained.stdout)
    assert report["labels"] == list("0123456789")
    assert report["scores"].keys() == {"eval", "digits"}
    assert len(Adapter.load(adapter).edits) == 32
    exported = cli("export", "--adapter", adapter, "--optimize", "none", "--out", bundle, "--json")
    assert exported.returncode == 0, exported.stderr
    plan = json.loads(exported.stdout)["manifest"]["plan"]
    assert all(edit["placement"] != "side op" for edit in plan["edits"])
    for way in ("--torch", "--no-torch"):
        verified = cli("verify", bundle, way)
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert Bundle.open(bundle).manifest.reference.rows == 48 + 1 + 1 + 4
    picture = tmp_path / "a.png"
    Image.fromarray(np.load(files["mnist_test"])["images"][0]).save(picture)
    ran = cli("run", bundle, "--image", picture, "--json")
    assert ran.returncode == 0, ran.stderr
    (answer,) = json.loads(ran.stdout)["answers"]
    assert answer["image"] == str(picture)
    assert answer["label"] in list("0123456789")
    for wrong, part in (
        (("--text", "x"), "reads pictures; pass --image"),
        (("--image", adapter), "is no picture"),
        (("--image", tmp_path / "no.png"), "does not exist"),
        ((), "nothing to answer"),
    ):
        refused = cli("run", bundle, *wrong)
        assert refused.returncode == 2
        assert part in refused.stderr
        assert len([line for line in refused.stderr.splitlines() if line.startswith("error:")]) == 1
