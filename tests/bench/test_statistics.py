"""What the samples support: simulated with known truths, refused where they are too few."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployfa.bench.statistics import Interval, median_ratio, minimum_samples, percentile, verdict
from deployfa.errors import StatisticsError


@pytest.mark.parametrize(("q", "needed"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.99, 662)])
def test_a_percentile_needs_its_samples(q, needed):
    assert minimum_samples(q) == needed
    samples = np.random.default_rng(0).permutation(needed).astype(float)
    assert percentile(samples, q) == pytest.approx(q * (needed - 1))
    with pytest.raises(StatisticsError, match=f"p{100 * q:g} needs {needed} samples, there are {needed - 1}; measure"):
        percentile(samples[1:], q)


@given(st.floats(0.02, 0.98))
def test_the_minimum_is_the_smallest_that_leaves_two_samples_in_the_tail(q):
    """P(at most one sample in the tail), exactly: at most 1 % at the minimum, more just below it."""
    tail = min(Fraction(q), 1 - Fraction(q))

    def at_most_one(n: int) -> Fraction:
        return sum(comb(n, k) * tail**k * (1 - tail) ** (n - k) for k in (0, 1))

    n = minimum_samples(q)
    # the float computation may be off by a rounding error where the probability is 1 % to the last digit
    assert at_most_one(n) <= Fraction(1, 100) * (1 + Fraction(1, 10**9))
    assert at_most_one(n - 1) > Fraction(1, 100) * (1 - Fraction(1, 10**9))


@pytest.mark.parametrize("q", [0, 1, 95])
def test_a_quantile_outside_its_range(q):
    with pytest.raises(StatisticsError, match=r"p95 is 0\.95"):
        percentile([1.0] * 1000, q)


def simulate(generator, ratio, *, launches=3, rounds=12, launch_sd=0.0, drift_sd=0.05):
    """Two contenders: a drift that both share in a round, right-skewed noise of each run, an effect of each launch."""
    pairs = []
    for _ in range(launches):
        drift = generator.normal(0, drift_sd, (rounds, 1))
        pair = []
        for scale in (1.0, ratio):
            noise = generator.normal(0, 0.005, (rounds, 1)) + np.abs(generator.normal(0, 0.02, (rounds, 4)))
            pair.append(scale * np.exp(generator.normal(0, launch_sd) + drift + noise))
        pairs.append(pair)
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs]


def coverage(interval_of, ratio, repeats, **setting):
    """How often the interval holds the true ratio."""
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(repeats):
        interval = interval_of(*simulate(generator, ratio, **setting))
        hits += interval.low <= ratio <= interval.high
    return hits / repeats


# 400 repeats of a 95 % interval hold the truth at least 92 % of the time with probability above 99 %
@pytest.mark.parametrize("launch_sd", [0.0, 0.01])
@pytest.mark.parametrize("launches", [2, 3])
def test_the_interval_holds_the_truth_as_often_as_it_says(launches, launch_sd):
    held = coverage(
        lambda x, ref: median_ratio(x, ref, resamples=200), 1.1, 400, launches=launches, launch_sd=launch_sd
    )
    assert held >= 0.92


def test_drawing_launches_with_replacement_would_not():
    """The textbook hierarchical bootstrap, for which the interval above is the remedy."""

    def hierarchical(mine, theirs):
        generator = np.random.default_rng(0)
        rounds = np.log(np.median(np.stack(mine), axis=2) / np.median(np.stack(theirs), axis=2))
        count, width = rounds.shape
        launch = generator.integers(0, count, (200, count, 1))
        drawn = rounds[launch, generator.integers(0, width, (200, count, width))]
        low, high = np.quantile(np.median(drawn, axis=2).mean(axis=1), (0.025, 0.975))
        return Interval(1.0, np.exp(low), np.exp(high))

    assert coverage(hierarchical, 1.1, 400, launches=2, launch_sd=0.01) < 0.8
    assert coverage(hierarchical, 1.1, 400, launches=3, launch_sd=0.01) < 0.9


def test_one_launch_knows_nothing_of_the_others():
    held = coverage(lambda x, ref: median_ratio(x, ref, resamples=200), 1.1, 200, launches=1, launch_sd=0.02)
    assert held < 0.5


def test_pairing_by_round_takes_the_drift_out():
    """Rounds shuffled against each other lose what they share: the interval must grow."""
    generator = np.random.default_rng(3)
    mine, theirs = simulate(generator, 1.02, launches=1, rounds=40, drift_sd=0.2)
    paired = median_ratio(mine, theirs)
    shuffled = median_ratio([generator.permutation(mine[0])], theirs)
    assert verdict(paired) == "slower"
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_the_same_seed_gives_the_same_interval():
    mine, theirs = simulate(np.random.default_rng(0), 1.3)
    assert median_ratio(mine, theirs, seed=4) == median_ratio(mine, theirs, seed=4)
    estimate = median_ratio(mine, theirs).estimate
    assert median_ratio(theirs, mine).estimate == pytest.approx(1 / estimate)
    assert median_ratio(mine, mine) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.8, 0.9, "faster"), (1.1, 1.2, "slower"), (0.9, 1.1, "indistinguishable"), (1.0, 1.2, "indistinguishable")],
)
def test_verdicts(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high)) == expected


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ([], [], "0 launches against 0"),
        ([(3, 4)], [(3, 4), (3, 4)], "1 launches against 2"),
        ([(4, 4)], [(3, 4)], "4 rounds against 3; only interleaved"),
        ([(2, 10)], [(2, 10)], "needs 3 rounds a launch, not 2"),
        ([(3, 3)], [(3, 4)], "needs 11 samples, there are 9"),
    ],
)
def test_a_ratio_that_the_blocks_cannot_support(mine, theirs, message):
    with pytest.raises(StatisticsError, match=message):
        median_ratio([np.ones(shape) for shape in mine], [np.ones(shape) for shape in theirs])
