"""The steps and what they give, held against transformers' own image processors of the PIL kind."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from deployfa.errors import DataError, InputError
from deployfa.preprocess import ImagePreprocessor, ImageSteps, Preprocessing, open_preprocessor
from deployfa.preprocess.image_steps import PREPROCESSOR_CONFIG, read_steps, steps_from_hub
from deployfa.preprocess.sample_pictures import SAMPLES, sample_pictures

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS: list[tuple[str, str, dict[str, Any]]] = [
    ("vit", "ViT", {}),
    ("vit", "ViT", {"do_rescale": False, "do_normalize": False}),
    ("vit", "ViT", {"resample": 1, "size": {"height": 33, "width": 61}}),
    # DINOv2's
    ("bit", "Bit", {"size": {"shortest_edge": 256}, **IMAGENET}),
    # larger than what is left of the picture: black beside it
    ("bit", "Bit", {"size": {"shortest_edge": 37}, "crop_size": {"height": 64, "width": 51}}),
    ("clip", "CLIP", {}),
    # ResNet's
    ("convnext", "ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 2, **IMAGENET}),
    ("convnext", "ConvNext", {}),
    ("efficientnet", "EfficientNet", {**IMAGENET, "size": {"height": 80, "width": 80}}),
    ("efficientnet", "EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_center_crop": True}),
    ("deit", "DeiT", {}),
    ("siglip", "Siglip", {}),
]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes = ((90, 120), (151, 97), (28, 28), (224, 224), (37, 401))
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize(("module", "kind", "options"), PROCESSORS, ids=lambda value: str(value)[:30])
def test_equal_to_transformers(module: str, kind: str, options: dict[str, Any], pictures: list[np.ndarray]) -> None:
    found = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(found, f"{kind}ImageProcessorPil")(**options)
    steps = steps_from_hub(json.loads(processor.to_json_string()))
    ours = ImagePreprocessor(steps).encode(pictures)["pixel_values"]
    theirs = np.stack(processor(pictures, return_tensors=None)["pixel_values"])
    assert ours.dtype == np.float32
    # an EfficientNet's second normalisation is put into the first, which rounds once less; the rest is equal in bits
    limit = 0.0 if kind != "EfficientNet" else 4 * np.spacing(np.abs(theirs).max())
    assert np.abs(ours - theirs).max() <= limit


def test_another_filter_is_seen(pictures: list[np.ndarray]) -> None:
    first, second = (
        ImagePreprocessor(ImageSteps(height=32, width=32, resize_to=(32, 32), resample=name)).encode(pictures)
        for name in ("bilinear", "bicubic")
    )
    assert np.abs(first["pixel_values"] - second["pixel_values"]).max() > 0.01


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
        {"feature_extractor_type": "CLIPFeatureExtractor"},
        {"image_processor_type": "CLIPImageProcessorFast"},
    ],
)
def test_older_and_newer_spellings(config: dict[str, Any]) -> None:
    steps = steps_from_hub(config)
    assert (steps.shortest_edge, steps.height, steps.width, steps.resample) == (224, 224, 224, "bicubic")


def test_one_number_is_a_square_for_vit() -> None:
    assert steps_from_hub({"feature_extractor_type": "ViTFeatureExtractor", "size": 96}).resize_to == (96, 96)


def test_one_channel_of_a_model_that_has_one() -> None:
    steps = steps_from_hub({"image_processor_type": "ViTImageProcessor", "size": 8}, channels=1)
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    pixels = ImagePreprocessor(steps).encode([picture])["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8)
    np.testing.assert_allclose(pixels[0, 0], (picture / 255 - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"image_processor_type": "DetrImageProcessor"}, "DetrImageProcessor"),
        ({}, "image_processor_type is ''"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "resample is 9"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 3}}, "longest_edge"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [0.0, 1.0, 1.0]}, "not 0"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [0.0, 1.0]}, "2 numbers"),
        ({"image_processor_type": "ViTImageProcessor", "size": 10**7}, "not from 1"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "different sizes"),
    ],
)
def test_what_is_not_done_is_refused(config: dict[str, Any], part: str, tmp_path: Path) -> None:
    (tmp_path / PREPROCESSOR_CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match=part) as caught:
        read_steps(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_steps(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="save the model's image processor"):
        read_steps(tmp_path)
    (tmp_path / PREPROCESSOR_CONFIG).write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        read_steps(tmp_path)


def test_saved_with_a_tokenizer(tmp_path: Path) -> None:
    config = {"processor_class": "CLIPProcessor", "image_processor": {"image_processor_type": "CLIPImageProcessor"}}
    (tmp_path / PREPROCESSOR_CONFIG).write_text(json.dumps(config))
    assert read_steps(tmp_path).height == 224


def test_the_manifest_brings_them_back() -> None:
    steps = steps_from_hub({"image_processor_type": "BitImageProcessor"})
    settings = Preprocessing(kind="image", max_length=1, image=steps)
    again = msgspec.json.decode(msgspec.json.encode(settings), type=Preprocessing)
    assert again == settings
    opened = open_preprocessor(Path(), again)
    assert isinstance(opened, ImagePreprocessor)
    assert opened.steps == steps


@pytest.mark.parametrize("change", [{"std": [0, 1, 1]}, {"height": 0}, {"crop": False}, {"channels": 4}, {"more": 1}])
def test_a_manifest_with_other_steps_is_refused(change: dict[str, Any]) -> None:
    steps = {"height": 8, "width": 8, "shortest_edge": 9, "crop": True, **change}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode({"kind": "image", "max_length": 1, "image": steps}), type=Preprocessing)


def test_kind_and_steps_go_together() -> None:
    for wrong in ({"kind": "image"}, {"kind": "text", "image": {"height": 8, "width": 8, "resize_to": [8, 8]}}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(msgspec.json.encode({**wrong, "max_length": 1}), type=Preprocessing)


def test_a_thread_of_pixels_is_not_blown_up() -> None:
    steps = ImageSteps(height=224, width=224, shortest_edge=224, crop=True)
    with pytest.raises(DataError, match="too long and thin"):
        ImagePreprocessor(steps).encode([np.zeros((1, 60_000), np.uint8)])


def test_errors_name_the_picture(tmp_path: Path) -> None:
    preprocessor = ImagePreprocessor(ImageSteps(height=8, width=8, resize_to=(8, 8)))
    (tmp_path / "no.png").write_bytes(b"nothing")
    Image.new("RGB", (3, 3)).save(tmp_path / "yes.png")
    with pytest.raises(DataError, match=r"no\.png"):
        preprocessor.encode([tmp_path / "yes.png", tmp_path / "no.png"])
    with pytest.raises(DataError, match="picture 2"):
        preprocessor.encode([(tmp_path / "yes.png").read_bytes(), b""])
    with pytest.raises(DataError, match="photo of a cat"):
        preprocessor.encode([b""], names=["photo of a cat"])
    with pytest.raises(DataError, match="no pictures"):
        preprocessor.encode([])


def test_samples_are_the_same_every_time_and_all_different() -> None:
    first, second = sample_pictures(), sample_pictures()
    assert len(first) == SAMPLES
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert len({picture.tobytes() for picture in first}) == SAMPLES
    assert all(picture.dtype == np.uint8 and picture.std() > 10 for picture in first)
    assert len({picture.shape for picture in first}) > 1


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": float("inf"), "width": 2}},
        {"image_processor_type": "ViTImageProcessor", "size": True},
        {"image_processor_type": "ViTImageProcessor", "size": {"height": 8000, "width": 8000}},
    ],
)
def test_numbers_that_are_no_sizes_are_one_line(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / PREPROCESSOR_CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError):
        read_steps(tmp_path)
