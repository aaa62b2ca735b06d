"""Accuracy figures, as fractions in [0, 1], and perplexity."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from deployfa.errors import StatisticsError

__all__ = ["Perplexity", "Scores", "mcnemar_exact", "perplexity", "score"]

Labels = npt.NDArray[np.int64]


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy, and balanced accuracy: the mean over classes of the share of that class that was found."""

    rows: int
    accuracy: float
    balanced_accuracy: float


def score(predicted: Labels, actual: Labels) -> Scores:
    """Both label arrays are (rows,); raises ``StatisticsError`` on none."""
    if actual.size == 0:
        raise StatisticsError("no rows to score; pass a file with labelled rows")
    right = predicted == actual
    recalls = [float(right[actual == label].mean()) for label in np.unique(actual)]
    return Scores(rows=int(actual.size), accuracy=float(right.mean()), balanced_accuracy=float(np.mean(recalls)))


def mcnemar_exact(only_first_right: int, only_second_right: int) -> float:
    """Two-sided exact McNemar test (McNemar 1947): the p-value that two classifiers err equally often.

    Under the null the discordant rows split as Binomial(n, 1/2); 1.0 when there are none.
    """
    n = only_first_right + only_second_right
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_first_right, only_second_right) + 1))
    # whole numbers until the division: 2**n leaves float's range at n = 1024
    return min(1.0, float(2 * tail / 2**n))


class Perplexity(msgspec.Struct, frozen=True, kw_only=True):
    """exp of the mean negative log-likelihood of ``tokens`` tokens, each given those before it in its row.

    ``None`` if that is NaN or infinity: JSON has no word for them.  ``base``: the same of the base model, without what
    was trained.
    """

    rows: int
    tokens: int
    perplexity: float | None
    base: float | None = None


def perplexity(log_likelihoods: npt.NDArray[np.floating], *, rows: int) -> Perplexity:
    """log_likelihoods: (tokens,), natural.  Raises ``StatisticsError`` on none."""
    if log_likelihoods.size == 0:
        raise StatisticsError("no tokens to score; pass a file with texts of two tokens or more")
    mean = float(np.mean(log_likelihoods, dtype=np.float64))
    # exp leaves float's range at 709
    found = math.exp(min(-mean, 700.0)) if math.isfinite(mean) else None
    return Perplexity(rows=rows, tokens=int(log_likelihoods.size), perplexity=found)
