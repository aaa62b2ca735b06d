"""What is done to a picture before a model sees it, as plain numbers; and those of a Hugging Face image processor.

Source: the PIL image processors of transformers, whose results these give.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from deployfa.errors import InputError

__all__ = ["PREPROCESSOR_CONFIG", "ImageSteps", "read_steps", "steps_from_hub"]

PREPROCESSOR_CONFIG = "preprocessor_config.json"
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
#: In Pillow's order, which is what Hugging Face writes.
_RESAMPLES: tuple[Resample, ...] = get_args(Resample)
_LARGEST = 4096


class ImageSteps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In this order: resize, crop the centre, ``pixel * scale``, ``(x - mean) / std`` a channel.

    ``height``, ``width``: of what the model gets, in pixels.  ``resize_to``: (height, width) to resize to;
    ``shortest_edge``: to resize that edge to, keeping the proportions; neither: no resizing.  ``crop``: the centre of
    height x width, with black beside it where the picture is smaller.  ``channels``: 3 (RGB) or 1 (grey).
    """

    height: int
    width: int
    resize_to: tuple[int, int] | None = None
    shortest_edge: int | None = None
    resample: Resample = "bilinear"
    crop: bool = False
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    channels: int = 3

    def __post_init__(self) -> None:
        # read from a manifest too, which anybody may have written
        edges = {"height": self.height, "width": self.width, "shortest_edge": self.shortest_edge}
        edges |= dict(zip(("resize_to", "resize_to's width"), self.resize_to or (), strict=False))
        for name, edge in edges.items():
            if edge is not None and not 1 <= edge <= _LARGEST:
                raise ValueError(f"{name} is {edge}, not from 1 to {_LARGEST}")
        if self.resize_to is not None and self.shortest_edge is not None:
            raise ValueError("resize_to and shortest_edge are two ways to resize, not one")
        if self.channels not in {1, 3}:
            raise ValueError(f"channels is {self.channels}, not 1 or 3")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std have {len(self.mean)} and {len(self.std)} numbers, not {self.channels}")
        if not all(map(math.isfinite, (*self.mean, *self.std, self.scale))) or 0 in {*self.std, self.scale}:
            raise ValueError("mean, std and scale must be finite, std and scale not 0")
        if not self.crop and self.resize_to != (self.height, self.width):
            raise ValueError("pictures would have different sizes, as they are neither cropped nor resized to one")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after resizing a picture of that size."""
        if self.shortest_edge is None:
            return self.resize_to or (height, width)
        # the long edge is rounded down, as transformers and torchvision do
        long = max(1, int(self.shortest_edge * max(height, width) / min(height, width)))
        return (self.shortest_edge, long) if height <= width else (long, self.shortest_edge)


def read_steps(folder: Path, *, channels: int = 3) -> ImageSteps:
    """The steps in ``preprocessor_config.json`` of a model directory.

    Raises ``InputError`` if there is none or it asks for what is not done here.
    """
    file = folder / PREPROCESSOR_CONFIG
    if not file.is_file():
        raise InputError(f"'{folder}' has no {PREPROCESSOR_CONFIG}; save the model's image processor there")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read '{file}' ({error}); save the model's image processor again") from error
    if not isinstance(config, dict):
        raise InputError(f"'{file}' is no JSON object; save the model's image processor again")
    # a processor that is saved with a tokenizer stands one level down
    inner = config.get("image_processor")
    try:
        return steps_from_hub(inner if isinstance(inner, dict) else config, channels=channels)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"'{file}' asks for what is not done here ({error}); prepare the pictures yourself, or write another one"
        ) from error


_IMAGENET = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "resample": 3,
}
#: Kind of processor → what it does where its file says nothing.  An edge given as one number is the shortest one where
#: ``size`` says so here.
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "ViT": {**_IMAGENET, "size": {"height": 224, "width": 224}, "resample": 2},
    "DeiT": {
        **_IMAGENET,
        "size": {"height": 256, "width": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
    },
    "Bit": _CLIP,
    "CLIP": _CLIP,
    "Siglip": {**_IMAGENET, "size": {"height": 224, "width": 224}, "resample": 3},
    "ConvNext": {**_IMAGENET, "size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 224 / 256},
    "EfficientNet": {
        **_IMAGENET,
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "resample": 3,
        "include_top": True,
    },
}
#: Where a file gives ``size`` as one number, it is the shortest edge for these and a square for the others.
_SHORTEST = {"Bit", "CLIP", "ConvNext"}
#: What a file may say that changes nothing here.
_OFF = ("do_pad", "do_reduce_labels", "do_flip_channel_order", "do_splits", "do_affine_transform", "do_thumbnail")


def steps_from_hub(config: Mapping[str, Any], *, channels: int = 3) -> ImageSteps:
    """``config``: the content of a ``preprocessor_config.json``.  ``channels``: of the model, 1 or 3.

    Raises ``ValueError``, with what is not known, for a processor that does anything else.
    """
    kind = _kind(config)
    told = {**_KINDS[kind], **{name: value for name, value in config.items() if value is not None}}
    for name in _OFF:
        if told.get(name):
            raise ValueError(f"{name} is on")
    crop_to = _edges(told["crop_size"]) if told.get("do_center_crop") else None
    resize_to, shortest = None, None
    if told.get("do_resize", True):
        resize_to, shortest = _resize(kind, told["size"])
    if kind == "ConvNext" and shortest is not None:
        # below 384 pixels it crops, from there on it warps
        edge = shortest
        resize_to, shortest = (None, int(edge / told["crop_pct"])) if edge < 384 else ((edge, edge), None)
        crop_to = crop_to or ((edge, edge) if edge < 384 else None)
    if crop_to is None and resize_to is None:
        raise ValueError("pictures would have different sizes, as they are neither cropped nor resized to one")
    height, width = crop_to or resize_to or (0, 0)
    mean, std, scale = _normalisation(kind, told)
    return ImageSteps(
        height=height,
        width=width,
        resize_to=resize_to,
        shortest_edge=shortest,
        resample=_resample(told["resample"]),
        crop=crop_to is not None,
        scale=scale,
        mean=_per_channel(mean, channels),
        std=_per_channel(std, channels),
        channels=channels,
    )


def _kind(config: Mapping[str, Any]) -> str:
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    kind = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if kind not in _KINDS:
        raise ValueError(f"image_processor_type is '{name}', known: {', '.join(_KINDS)}")
    return kind


def _resize(kind: str, size: Any) -> tuple[tuple[int, int] | None, int | None]:
    if isinstance(size, int) and not isinstance(size, bool):
        return (None, size) if kind in _SHORTEST else ((size, size), None)
    if set(size) == {"shortest_edge"}:
        return None, int(size["shortest_edge"])
    return _edges(size), None


def _edges(size: Any) -> tuple[int, int]:
    if isinstance(size, bool):
        raise ValueError(f"a size is {size}")
    if isinstance(size, int):
        return size, size
    if set(size) != {"height", "width"}:
        raise ValueError(f"a size is given as {', '.join(sorted(map(str, size)))}")
    return int(size["height"]), int(size["width"])


def _resample(number: Any) -> Resample:
    if not isinstance(number, int) or not 0 <= number < len(_RESAMPLES):
        raise ValueError(f"resample is {number}")
    return _RESAMPLES[number]


def _normalisation(kind: str, told: Mapping[str, Any]) -> tuple[list[float], list[float], float]:
    """(mean, std, scale), one number or one a channel; what an EfficientNet does after them is put into them."""
    scale = float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0
    mean, std = [0.0], [1.0]
    if told.get("do_normalize", True):
        mean, std = _listed(told["image_mean"]), _listed(told["image_std"])
    if kind == "EfficientNet":
        if told.get("rescale_offset") and told.get("do_rescale", True):
            mean = [m + 1.0 for m in mean]
        if told.get("include_top"):
            # normalised once more, by a mean of 0 and the same deviation
            again = _listed(told["image_std"])
            std = [s * t for s, t in zip(std if len(std) == len(again) else [std[0]] * len(again), again, strict=True)]
    return mean, std, scale


def _listed(numbers: Any) -> list[float]:
    return [float(numbers)] if isinstance(numbers, int | float) else [float(number) for number in numbers]


def _per_channel(numbers: list[float], channels: int) -> tuple[float, ...]:
    if len(numbers) == 1 or len(set(numbers)) == 1:
        return (numbers[0],) * channels
    if len(numbers) != channels:
        raise ValueError(f"mean or std has {len(numbers)} numbers for a model of {channels} channels")
    return tuple(numbers)
