"""Accuracy against scikit-learn, McNemar against scipy's binomial test, perplexity against its definition."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from deployfa.errors import StatisticsError
from deployfa.metrics import Perplexity, mcnemar_exact, perplexity, score

#: a mean of n terms in another order differs by at most n roundings
EPS = 2.0**-53


@given(st.integers(1, 60).flatmap(lambda n: hnp.arrays(np.int64, (2, n), elements=st.integers(0, 3))))
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_score_agrees_with_scikit_learn(labels):
    predicted, actual = labels
    scores = score(predicted, actual)
    assert scores.rows == actual.size
    assert abs(scores.accuracy - accuracy_score(actual, predicted)) <= actual.size * EPS
    assert abs(scores.balanced_accuracy - balanced_accuracy_score(actual, predicted)) <= actual.size * EPS


def test_balanced_accuracy_is_not_accuracy():
    scores = score(np.zeros(10, np.int64), np.array([0] * 9 + [1]))
    assert (scores.accuracy, scores.balanced_accuracy) == (0.9, 0.5)


def test_no_rows():
    with pytest.raises(StatisticsError, match="no rows"):
        score(np.zeros(0, np.int64), np.zeros(0, np.int64))


@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_agrees_with_the_binomial_test(first, second):
    expected = 1.0 if first + second == 0 else binomtest(first, first + second, 0.5).pvalue
    # scipy sums n probabilities, each of n factors, in floating point
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=4 * (first + second + 1) ** 2 * EPS, abs=0)


def test_mcnemar_of_more_rows_than_float_has_exponents():
    assert mcnemar_exact(1000, 1100) == pytest.approx(binomtest(1000, 2100, 0.5).pvalue, rel=2100**2 * EPS)
    assert mcnemar_exact(3000, 3000) == 1.0
    assert mcnemar_exact(0, 2000) == 0.0  # 2 / 2**2000 is below the smallest float


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    found = perplexity(np.log([0.5, 0.25, 0.125]), rows=2)
    assert (found.rows, found.tokens, found.base) == (2, 3, None)
    assert found.perplexity == pytest.approx(4.0)
    # in float64, whatever it is given
    assert perplexity(np.full(10_000, -1.0, np.float16), rows=1).perplexity == pytest.approx(math.e, rel=1e-12)
    with pytest.raises(StatisticsError, match="no tokens"):
        perplexity(np.array([]), rows=0)


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_perplexity_that_is_no_number_is_none(wrong: float) -> None:
    """JSON has no word for it, and whoever reads the report decodes it by its type."""
    found = perplexity(np.array([-1.0, wrong]), rows=1)
    assert found.perplexity is None
    assert msgspec.json.decode(msgspec.json.encode(found), type=Perplexity) == found
    huge = perplexity(np.array([-1e5]), rows=1).perplexity
    assert huge is not None and math.isfinite(huge)
