"""What is drawn beforehand: send times and adapters, against their exact distributions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deployfa.errors import InputError
from deployfa.load.adapters import AdapterSpec
from deployfa.load.arrivals import poisson_times


def gaps_fit(times: np.ndarray, rate: float) -> float:
    """The p-value of a Kolmogorov-Smirnov test of the gaps against the exponential distribution."""
    return float(stats.kstest(np.diff(times, prepend=0.0), "expon", args=(0, 1 / rate)).pvalue)


def test_arrivals_are_a_poisson_process() -> None:
    times = poisson_times(500, 20, np.random.default_rng(0))
    assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] < 20
    assert gaps_fit(times, 500) > 0.01
    # counts of a second scatter by the root of their mean
    counts = np.bincount(times.astype(int), minlength=20)
    assert 0.4 < counts.var(ddof=1) / 500 < 2


def test_evenly_spaced_arrivals_are_found_out() -> None:
    assert gaps_fit(np.arange(10_000) / 500, 500) < 1e-9
    assert gaps_fit(poisson_times(510, 20, np.random.default_rng(0)), 450) < 0.01


@pytest.mark.parametrize(("rate", "seconds"), [(0.01, 1), (1, 0.001), (3, 1000)])
def test_short_and_long_runs_end_where_they_should(rate: float, seconds: float) -> None:
    counts = [len(poisson_times(rate, seconds, np.random.default_rng(seed))) for seed in range(50)]
    assert abs(np.mean(counts) - rate * seconds) < 4 * np.sqrt(rate * seconds / 50) + 0.02


@pytest.mark.parametrize("text", ["zipf:1.1:50", "zipf:0:7", "zipf:3:4", "uniform:16", "a,b,c"])
def test_adapters_are_as_popular_as_they_should_be(text: str) -> None:
    spec = AdapterSpec.parse(text)
    exact = np.arange(1, spec.count + 1) ** -spec.exponent
    counts = np.bincount(spec.draw(100_000, np.random.default_rng(1)), minlength=spec.count)
    assert len(counts) == spec.count
    assert stats.chisquare(counts, 100_000 * exact / exact.sum()).pvalue > 0.001
    np.testing.assert_allclose(spec.probabilities(), exact / exact.sum(), rtol=1e-12)


def test_another_exponent_is_found_out() -> None:
    counts = np.bincount(AdapterSpec.parse("zipf:1.1:50").draw(100_000, np.random.default_rng(1)), minlength=50)
    assert stats.chisquare(counts, 100_000 * AdapterSpec.parse("zipf:1.0:50").probabilities()).pvalue < 1e-9


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("zipf:x", "no number of adapters"),
        ("zipf:1.1", "no number of adapters"),
        ("uniform:", "where a number belongs"),
        ("zipf:x:3", "where a number belongs"),
        ("zipf:1.1:2.5", "where a number belongs"),
        ("zipf:-1:3", "at least 0"),
        ("zipf:nan:3", "at least 0"),
        ("uniform:0", "at least one adapter"),
        ("uniform:2:3", "no number of adapters"),
        ("a,,b", "without a name"),
        ("", "without a name"),
        ("a,b,a", "twice"),
    ],
)
def test_bad_specs_say_what_to_write(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part) as caught:
        AdapterSpec.parse(text)
    assert "; " in str(caught.value) and "zipf:1.1:1000" in str(caught.value)


def test_names_come_from_the_server_and_base_is_no_adapter() -> None:
    served = ["base", "shop", "movies", "news"]
    assert AdapterSpec.parse("uniform:2").resolve(served, "there") == ["shop", "movies"]
    assert AdapterSpec.parse("uniform:2").resolve(None, "there") == ["adapter-0", "adapter-1"]
    assert AdapterSpec.parse("news,base").resolve(served, "there") == ["news", "base"]
    assert AdapterSpec.parse("anything").resolve(None, "there") == ["anything"]


def test_too_few_adapters_and_unknown_names_say_the_fix() -> None:
    with pytest.raises(InputError, match=r"has 3 adapters and 'zipf:1.1:9' asks for 9; pass --adapters zipf:1.1:3,"):
        AdapterSpec.parse("zipf:1.1:9").resolve(["base", "a", "b", "c"], "there")
    with pytest.raises(InputError, match=r"0 adapters .*; add adapters to it"):
        AdapterSpec.parse("uniform:1").resolve(["base"], "there")
    with pytest.raises(InputError, match=r"no adapter 'shpo' at there; .*shop"):
        AdapterSpec.parse("shpo").resolve(["base", "movies", "shop"], "there")
