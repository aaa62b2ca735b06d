"""What latency samples can support, and what they cannot.  Pure numpy; nothing here knows where a sample came from.

Blocks: one contender's samples in one launch, an array (rounds, runs) in milliseconds.  In every round of a launch all
contenders ran one block each, so round i of one contender is paired with round i of another: what slowed the machine
in that round slowed both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deployfa.errors import StatisticsError

__all__ = ["Interval", "Verdict", "median_ratio", "minimum_samples", "percentile", "verdict"]

Array = npt.NDArray[Any]
Verdict = Literal["reference", "faster", "slower", "indistinguishable"]

# Student's t, two-sided 95 %, for 1 to 9 degrees of freedom: all that 2 to 10 launches need
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Interval:
    """A ratio and its 95 % confidence interval."""

    estimate: float
    low: float
    high: float


def minimum_samples(q: float) -> int:
    """The fewest samples that support quantile ``q`` (0 < q < 1): p50 11, p90 64, p95 130, p99 662.

    The smallest n of which, with 99 % probability, at least two samples lie beyond the true quantile:
    ``P(Binomial(n, min(q, 1 - q)) <= 1) <= 0.01``.  With fewer, the figure is little more than the single worst run.
    """
    if not 0 < q < 1:
        raise StatisticsError(f"quantile {q} is not between 0 and 1; p95 is 0.95")
    tail = min(q, 1 - q)
    n = 2
    while (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1) > 0.01:
        n += 1
    return n


def percentile(samples: Array | Sequence[float], q: float) -> float:
    """Quantile ``q`` of ``samples`` (n,), interpolated linearly.

    Raises ``StatisticsError`` with fewer than ``minimum_samples(q)`` samples.
    """
    values = np.asarray(samples, dtype=np.float64).ravel()
    needed = minimum_samples(q)
    if values.size < needed:
        raise StatisticsError(f"p{100 * q:g} needs {needed} samples, there are {values.size}; measure for longer")
    return float(np.quantile(values, q))


def median_ratio(
    blocks: Sequence[Array], reference: Sequence[Array], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """How many times the reference's median latency a contender takes, with a 95 % confidence interval.

    blocks, reference: one array (rounds, runs) a launch, the same number of launches and of rounds in each.
    Of a round: the median of the contender's block over the median of the reference's.  Of a launch: the median of its
    rounds.  Estimate: the geometric mean of the launches.  Comparing round by round keeps a slow minute of the machine
    out of the ratio, which the medians of all samples let in: whichever contender had one round more in it looks slow.

    Two things make the ratio uncertain, and the interval is the wider of the two that answer them:

    - within a launch, noise: a bootstrap that draws rounds with replacement, both contenders' together;
    - between launches, where a process's memory happened to lie: Student's t over the launches' log ratios.  Drawing
      launches with replacement would answer it too, but from 2 or 3 launches such an interval holds the truth far
      less often than it says (66 and 80 % for 95 %, where launches differ by 1 %; this one 94 to 95 %); see the tests.

    With one launch the interval knows nothing of the second, and no verdict should be drawn from it.

    Raises ``StatisticsError`` on unpaired blocks, fewer than 3 rounds, or fewer samples than a median needs.
    """
    _check_pairs(blocks, reference)
    generator = np.random.default_rng(seed)
    replicates = np.zeros(resamples)
    logs = np.empty(len(blocks))
    for launch, (mine, theirs) in enumerate(zip(blocks, reference, strict=True)):
        rounds = np.log(np.median(mine, axis=1) / np.median(theirs, axis=1))
        logs[launch] = np.median(rounds)
        drawn = generator.integers(0, len(rounds), (resamples, len(rounds)))
        replicates += np.median(rounds[drawn], axis=1) / len(blocks)
    estimate = float(logs.mean())
    low, high = (float(value) for value in np.quantile(replicates, (0.025, 0.975)))
    if len(logs) > 1:
        reach = _t95(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        low, high = min(low, estimate - reach), max(high, estimate + reach)
    return Interval(math.exp(estimate), math.exp(low), math.exp(high))


def verdict(interval: Interval) -> Verdict:
    """``indistinguishable`` when the interval covers 1."""
    if interval.low <= 1.0 <= interval.high:
        return "indistinguishable"
    return "faster" if interval.high < 1.0 else "slower"


def _t95(degrees: int) -> float:
    """Beyond the table the quantile is that of 9 degrees: a little too wide, never too narrow."""
    return _T95[min(degrees, len(_T95)) - 1]


def _check_pairs(blocks: Sequence[Array], reference: Sequence[Array]) -> None:
    if not blocks or len(blocks) != len(reference):
        raise StatisticsError(
            f"{len(blocks)} launches against {len(reference)}; both contenders need the same launches to be compared"
        )
    for mine, theirs in zip(blocks, reference, strict=True):
        if len(mine) != len(theirs):
            raise StatisticsError(f"{len(mine)} rounds against {len(theirs)}; only interleaved rounds can be compared")
        if len(mine) < _LEAST_ROUNDS:
            raise StatisticsError(f"a ratio needs {_LEAST_ROUNDS} rounds a launch, not {len(mine)}; measure for longer")
    needed = minimum_samples(0.5)
    for each in (blocks, reference):
        count = sum(block.size for block in each)
        if count < needed:
            raise StatisticsError(f"a ratio of medians needs {needed} samples, there are {count}; measure for longer")
