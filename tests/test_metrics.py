"""Accuracy against scikit-learn, McNemar against scipy's binomial test."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from deployfa.errors import StatisticsError
from deployfa.metrics import mcnemar_exact, score

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
