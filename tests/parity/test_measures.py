"""The figures of a stage on hand-made logits."""

from __future__ import annotations

import numpy as np
import pytest

from deployfa.parity.measures import LIMIT, measure

TRUTH = np.array([[3.0, 1.0], [0.0, 2.0], [1.0, 1.001], [5.0, 0.0]])
BASE = np.zeros_like(TRUTH)


def _stage(found: np.ndarray, *, noise: float = 1e-3, noise_max_abs: float = 1e-3, **more: object):
    return measure("x", [found], [TRUTH], [BASE], noise=noise, noise_max_abs=noise_max_abs, **more)


def test_equal_output_has_no_error() -> None:
    stage = _stage(TRUTH)
    assert (stage.error, stage.max_abs, stage.flips, stage.passed) == (0.0, 0.0, 0, True)
    assert stage.effect_error == 0.0


def test_the_error_is_normwise() -> None:
    found = TRUTH.copy()
    found[3, 0] += 0.1
    stage = _stage(found)
    assert stage.error == pytest.approx(0.1 / np.linalg.norm(TRUTH))
    assert stage.effect_error == pytest.approx(0.1 / np.linalg.norm(TRUTH - BASE))
    assert stage.max_abs == pytest.approx(0.1)
    assert not stage.passed


def test_the_limit_is_a_multiple_of_the_noise() -> None:
    found = TRUTH.copy()
    found[3, 0] += 0.1
    error = 0.1 / np.linalg.norm(TRUTH)
    assert _stage(found, noise=error / LIMIT * 1.001).passed
    assert not _stage(found, noise=error / LIMIT * 0.999).passed


def test_a_flip_that_noise_explains_passes_and_one_that_it_does_not_fails() -> None:
    close, far = TRUTH.copy(), TRUTH.copy()
    close[2] = [1.001, 1.0]
    far[1] = [2.0, 0.0]
    near = _stage(close, noise=1.0)
    assert (near.flips, near.flips_outside_noise, near.passed) == (1, 0, True)
    wrong = _stage(far, noise=10.0)
    assert (wrong.flips, wrong.flips_outside_noise, wrong.passed) == (1, 1, False)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_never_pass(value: float) -> None:
    found = TRUTH.copy()
    found[0, 0] = value
    stage = _stage(found, noise=1e9)
    assert (stage.finite, stage.passed, stage.error) == (False, False, None)


def test_accuracy_counts_data_rows_only_and_mcnemar_compares_with_the_truth() -> None:
    found = TRUTH.copy()
    found[1] = [2.0, 0.0]
    data = np.array([True, True, True, False])
    labels = np.array([0, 1, 1])
    right = TRUTH[data].argmax(-1) == labels
    stage = _stage(found, data=data, labels=labels, truth_right=right)
    assert stage.accuracy == pytest.approx(2 / 3)
    assert stage.mcnemar_p == 1.0  # one discordant row: 2 * 1/2
