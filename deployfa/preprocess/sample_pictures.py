"""Pictures for a reference when nobody brings data: drawn by arithmetic, the same on every machine."""

from __future__ import annotations

import numpy as np

from deployfa.edits import Array

__all__ = ["SAMPLES", "sample_pictures"]

#: Enough rows that the ratio of two noises settles, and few, because float64 in numpy is slow.
SAMPLES = 48
_SIZES = ((48, 64), (64, 48), (56, 56), (40, 72))


def sample_pictures(count: int = SAMPLES, *, seed: int = 0) -> list[Array]:
    """``count`` pictures, uint8 (height, width, 3): a slope, stripes, discs and some grain, in colours of their own."""
    return [_picture(np.random.default_rng((seed, number)), *_SIZES[number % len(_SIZES)]) for number in range(count)]


def _picture(random: np.random.Generator, height: int, width: int) -> Array:
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width], float)[:, None, None]
    angle, stripes = random.uniform(0, np.pi), random.uniform(2, 12)
    along = np.cos(angle) * x + np.sin(angle) * y
    picture = random.uniform(0, 255, 3) * (1 - along[..., None]) + random.uniform(0, 255, 3) * along[..., None]
    picture += random.uniform(10, 60) * np.sin(2 * np.pi * stripes * along)[..., None]
    for _ in range(random.integers(1, 5)):
        centre, radius = random.uniform(0.1, 0.9, 2), random.uniform(0.08, 0.35)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        picture[inside] = random.uniform(0, 255, 3)
    picture += random.normal(0, random.uniform(1, 12), picture.shape)
    return np.asarray(np.clip(picture, 0, 255).round().astype(np.uint8))
