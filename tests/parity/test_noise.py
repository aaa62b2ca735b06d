"""The unit of every error: several runs, whose weights differ by what rounding once does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from deployfa.edits import Array
from deployfa.parity.noise import Noise, neighbours


@pytest.fixture
def weight() -> Array:
    return np.random.default_rng(0).normal(size=(300, 400)).astype(np.float32)


def test_one_in_twelve_moves_by_one_ulp_either_way(weight: Array) -> None:
    moved = neighbours(weight, 1)
    assert moved.dtype == np.float32 and moved.shape == weight.shape
    steps = (moved.astype(np.float64) - weight) / np.spacing(np.abs(weight))
    # half a step for a power of two, whose neighbour below is nearer
    assert set(np.unique(np.abs(steps))) <= {0.0, 0.5, 1.0}
    deviation = np.sqrt(weight.size / 12)
    assert abs((steps > 0).sum() - weight.size / 24) < 4 * deviation
    assert abs((steps < 0).sum() - weight.size / 24) < 4 * deviation


def test_the_variance_is_that_of_rounding_once(weight: Array) -> None:
    exact = np.random.default_rng(2).normal(size=weight.shape)
    rounded = exact.astype(np.float32)
    once = (rounded - exact) / np.spacing(np.abs(rounded))
    moved = neighbours(rounded, 1)
    again = (moved.astype(np.float64) - rounded) / np.spacing(np.abs(rounded))
    assert np.var(again) == pytest.approx(np.var(once), rel=0.05)


def test_what_was_passed_in_stays(weight: Array) -> None:
    before = weight.copy()
    assert not np.array_equal(neighbours(weight, 1), weight)
    np.testing.assert_array_equal(weight, before)


def test_nothing_becomes_infinite_or_ceases_to_be() -> None:
    edge = np.full((50, 50), np.finfo(np.float32).min)
    moved = neighbours(edge, 1)
    assert np.isfinite(moved).all() and not np.array_equal(moved, edge)
    for number in (np.inf, -np.inf, 0.0):
        stays = np.full((50, 50), np.float32(number))
        np.testing.assert_array_equal(neighbours(stays, 1), stays)


TRUTH = [np.array([[3.0, 0.0]]), np.array([[0.0, 4.0]])]


def off_by(errors: list[float]) -> tuple[Callable[[int], list[Array]], list[int]]:
    """Runs whose every number is off by so much, and the seeds that were asked for."""
    asked: list[int] = []

    def run(seed: int) -> list[Array]:
        asked.append(seed)
        return [each + errors[seed] for each in TRUTH]

    return run, asked


def test_four_runs_that_agree_are_enough() -> None:
    run, asked = off_by([0.100, 0.105, 0.102, 0.101, 7.0])
    noise = Noise.of(run, TRUTH)
    assert asked == [0, 1, 2, 3]
    assert noise.relative == pytest.approx(2 * 0.105 / 5) and noise.max_abs == pytest.approx(0.105)


def test_it_is_the_largest_of_those_that_do_not() -> None:
    errors = [0.1, -0.1, 0.1, 0.2, 0.1, 0.3, 0.1, 0.2]
    run, asked = off_by(errors)
    noise = Noise.of(run, TRUTH)
    assert asked == list(range(8))
    assert noise.relative == pytest.approx(2 * 0.3 / 5) and noise.max_abs == pytest.approx(0.3)
    for found, each in zip(noise.float32, TRUTH, strict=True):
        np.testing.assert_array_equal(found, each + 0.1)


def test_of_several_models_together_one_run_each_may_do() -> None:
    run, asked = off_by([0.1, 0.2])
    assert Noise.of(run, TRUTH, most=1).relative == pytest.approx(2 * 0.1 / 5)
    assert asked == [0]


@pytest.mark.parametrize("error", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1, 5])
def test_a_run_that_is_no_number_is_no_noise(error: float, where: int) -> None:
    errors = [0.1 * 2**each for each in range(8)]
    errors[where] = error
    run, _ = off_by(errors)
    assert not np.isfinite(Noise.of(run, TRUTH).relative)
