"""How far float32 is from the truth in a given model: the unit that every error here is counted in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from deployfa.edits import Array
from deployfa.parity.cases import Case

__all__ = ["FEWEST_RUNS", "MOST_RUNS", "Noise", "neighbours"]

#: How many float32 runs of a model its noise is measured on: so many at least, and more while they do not agree.
FEWEST_RUNS, MOST_RUNS = 4, 8
#: Runs agree if none is so many times as far from the truth as another one.
AGREE = 1.1
#: A number rounded once is off by a variance of ulp²/12; so is one that moves by an ulp one time in twelve.
MOVED = 12


@dataclasses.dataclass(frozen=True)
class Noise:
    """float32 against float64 in the same model on the same inputs: normwise relative, and the largest logit error.

    One run says little where the outputs are few: the errors of all rows go together, and one correct program is more
    than twice as far from the truth as another one time in twenty (``benchmarks/noise.py``).  So it is the largest of
    several runs, whose weights differ by what rounding them once does.  ``float32`` are the answers of the model as it
    is, per case; empty when the noise was read from a bundle.
    """

    relative: float
    max_abs: float
    float32: tuple[Array, ...]

    @classmethod
    def of(cls, run: Callable[[int], Sequence[Array]], float64: Sequence[Array], *, most: int = MOST_RUNS) -> Noise:
        """``run(0)``: the answers per case of the model as it is; ``run(seed)``: with other ``neighbours``."""
        double = np.concatenate(list(float64))
        size = np.linalg.norm(double)
        float32: tuple[Array, ...] = ()
        relative, largest = [], []
        for seed in range(most):
            answers = tuple(run(seed))
            float32 = float32 or answers
            difference = np.abs(np.concatenate(answers).astype(np.float64) - double)
            relative.append(float(np.linalg.norm(difference) / size))
            largest.append(float(difference.max()))
            if seed + 1 >= FEWEST_RUNS and max(relative) <= AGREE * min(relative):
                break
        # not max(), which may pass a NaN over
        return cls(float(np.max(relative)), float(np.max(largest)), float32)

    def silent(self, cases: Sequence[Case]) -> bool:
        """Whether the adapted model answered, bit for bit, what its base did: both ran in float32 by the same code."""
        pairs = zip(self.float32, cases, strict=False)
        return bool(self.float32) and all(
            np.array_equal(found, case.base) for found, case in pairs if case.base is not None
        )


def neighbours(weight: Array, seed: int | tuple[int, ...]) -> Array:
    """``weight``, float32, with one number in twelve moved to the next above or below.

    Zeros stay, which no rounding made, and so does what is infinite or would become so.
    """
    draw = np.random.default_rng(seed).random(weight.shape, dtype=np.float32)
    toward = np.where(draw < 0.5 / MOVED, np.float32(np.inf), np.float32(-np.inf))
    with np.errstate(over="ignore"):
        moved = np.nextafter(weight, toward)
    movable = np.isfinite(weight) & np.isfinite(moved) & (weight != 0)
    return np.where(movable & (draw < 1 / MOVED), moved, weight)
