"""Pictures → feeds, with Pillow and numpy alone: the same code for training, verifying and running."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deployfa.edits import Array
from deployfa.errors import DataError
from deployfa.preprocess.image_steps import ImageSteps
from deployfa.preprocess.picture import MAX_PIXELS, Picture, open_picture
from deployfa.preprocess.sample_pictures import sample_pictures

__all__ = ["PIXELS", "ImagePreprocessor"]

#: The input of every Hugging Face vision model.
PIXELS = "pixel_values"


class ImagePreprocessor:
    """Decode, turn upright, resize, crop and normalise, as ``steps`` say."""

    #: of no tokens
    max_length = 1

    def __init__(self, steps: ImageSteps, *, max_pixels: int = MAX_PIXELS) -> None:
        self.steps = steps
        self._max_pixels = max_pixels
        # a channel has 256 values: what becomes of each is computed once, and rounded as transformers rounds it
        scaled = (np.arange(256, dtype=np.float64) * steps.scale).astype(np.float32)
        mean, std = np.array(steps.mean, np.float32), np.array(steps.std, np.float32)
        self._values = (scaled - mean[:, None]) / std[:, None]

    @cached_property
    def samples(self) -> Sequence[Picture]:
        """Made-up pictures for a reference when nobody brings data."""
        return sample_pictures()

    def encode(
        self, items: Sequence[Picture], *, length: int | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """``pixel_values``: float32 (batch, channels, height, width).

        ``names``: what an error calls the pictures, by default their paths or numbers.  Raises ``DataError`` for one
        that cannot be read.
        """
        if not len(items):
            raise DataError("there are no pictures; give at least one")
        steps = self.steps
        pixels = np.empty((len(items), steps.channels, steps.height, steps.width), np.float32)
        for number, item in enumerate(items):
            own = f"'{item}'" if isinstance(item, str | Path) else f"picture {number + 1}"
            cropped = self._pixels(item, names[number] if names is not None else own)
            for channel in range(steps.channels):
                np.take(self._values[channel], cropped[:, :, channel], out=pixels[number, channel])
        return {PIXELS: pixels}

    def lengths(self, items: Sequence[Picture]) -> list[int]:
        """Pictures are all of one size to the model."""
        return [1] * len(items)

    def _pixels(self, item: Picture, name: str) -> Array:
        """uint8 (height, width, channels), resized and cropped."""
        from PIL import Image

        steps = self.steps
        image: Any = open_picture(item, name=name, channels=steps.channels, max_pixels=self._max_pixels)
        height, width = steps.resized(image.height, image.width)
        if height * width > self._max_pixels:
            raise DataError(f"{name} is too long and thin, {image.width} x {image.height} pixels; crop it")
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling[steps.resample.upper()])
        pixels = np.asarray(image).reshape(height, width, steps.channels)
        return _centre(pixels, steps.height, steps.width) if steps.crop else pixels


def _centre(pixels: Array, height: int, width: int) -> Array:
    """The middle of ``pixels``, or ``pixels`` in the middle of black, an odd row above, an odd column left."""
    for axis, wanted in enumerate((height, width)):
        have = pixels.shape[axis]
        if have >= wanted:
            start = (have - wanted) // 2
            pixels = pixels[start : start + wanted] if axis == 0 else pixels[:, start : start + wanted]
        else:
            before = -(-(wanted - have) // 2)
            pad = [(0, 0)] * 3
            pad[axis] = (before, wanted - have - before)
            pixels = np.pad(pixels, pad)
    return pixels
