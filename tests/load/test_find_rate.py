"""The search for a rate, on rules that are known and on a real server of known capacity."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from deployfa.errors import InputError
from deployfa.load import LoadOptions, find_rate
from deployfa.load.find_rate import blame
from deployfa.load.open_loop import Samples
from deployfa.load.report import Step
from deployfa.load.search import Found, search

from .server import Server


def step(rate: float, verdict: str) -> Step:
    return Step(
        rate_per_s=rate,
        seconds=1,
        sent=1000,
        achieved_per_s=rate,
        quantile_ms=1,
        share=1,
        failed_share=0,
        late_p99_ms=0,
        cpu_share=0,
        verdict=verdict,
    )


def run(rule: Callable[[float, int], str | None], start: float, lowest: float = 1) -> tuple[Found, list[Step]]:
    """rule(rate, number of this step, from 1) → verdict, or ``None`` to end early."""
    number = 0

    async def measure(rate: float) -> Step | None:
        nonlocal number
        number += 1
        verdict = rule(rate, number)
        return None if verdict is None else step(rate, verdict)

    return asyncio.run(search(measure, start, lowest))


@pytest.mark.parametrize("start", [3.0, 100.0, 137.0, 140.0, 5000.0])
def test_the_capacity_is_found_to_5_percent_in_at_least_8_steps(start: float) -> None:
    found, steps = run(lambda rate, _: "within" if rate <= 137 else "late", start)
    assert found.rate is not None and found.limit is not None
    assert 137 / 1.05 <= found.rate <= 137 < found.limit.rate_per_s
    assert 8 <= len(steps) <= 20 and sum(each.rate_per_s == found.rate for each in steps) >= 2


def test_a_rate_that_was_luck_is_given_up() -> None:
    def rule(rate: float, number: int) -> str:
        return "within" if rate <= 100 or (number == 1 and rate <= 200) else "late"

    found, _ = run(rule, 200)
    assert found.rate is not None and 95 <= found.rate <= 100


def test_nothing_within_ends_at_the_lowest_rate() -> None:
    found, steps = run(lambda *_: "errors", 100, lowest=10)
    assert found.rate is None and [each.rate_per_s for each in steps] == [100, 50, 25, 12.5, 10]


def test_an_interrupted_search_tells_what_it_knows() -> None:
    found, steps = run(lambda rate, number: "within" if number < 3 else None, 100)
    assert (found.rate, found.limit, len(steps)) == (200, None, 2)


def test_a_server_of_known_capacity(serve: Callable[..., Server]) -> None:
    """10 ms an answer, one at a time: less than 100 a second, whatever the machine."""
    server = serve(serial=0.01)
    options = LoadOptions(server.url, rate=40, duration=0.3, warmup=0, slo_ms=100)
    report = find_rate(options, quantile=0.5)
    assert report.found_per_s is not None and report.limit_per_s is not None
    # a short step may start lucky; it cannot answer twice what the server is able to
    assert report.found_per_s < 200 and report.limit_per_s / report.found_per_s <= 1.051
    assert len(report.steps) >= 8 and {each.verdict for each in report.steps} > {"within"}


def test_a_server_that_sheds_is_not_within(serve: Callable[..., Server]) -> None:
    server = serve(behave="shed")
    report = find_rate(LoadOptions(server.url, rate=100, duration=0.05, warmup=0, slo_ms=1000), quantile=0.5)
    assert report.found_per_s is None and {each.verdict for each in report.steps} == {"errors"}


@pytest.mark.parametrize(
    ("late_ms", "cpu", "culprit"),
    [(0, 0.2, "late"), (40, 0.2, "late"), (60, 0.2, "generator"), (0, 0.95, "generator")],
)
def test_the_generator_is_blamed_only_if_its_lateness_made_the_difference(
    late_ms: float, cpu: float, culprit: str
) -> None:
    """All took 100 ms from when they were to be sent, 50 were allowed."""
    samples = Samples(
        late_s=np.full(100, late_ms / 1e3),
        latency_s=np.full(100, 0.1),
        outcome=np.full(100, 200),
        index=np.arange(100),
        seconds=1,
        elapsed_s=1,
        cpu_share=cpu,
        interrupted=False,
    )
    assert blame(samples, 50, 0.99) == culprit


def test_what_cannot_be_found_is_said_before_anything_is_sent(serve: Callable[..., Server]) -> None:
    with pytest.raises(InputError, match="pass --slo-ms"):
        find_rate(LoadOptions("localhost:1"))
    with pytest.raises(InputError, match="--slo-quantile 1 is not between 0 and 1"):
        find_rate(LoadOptions("localhost:1", slo_ms=50), quantile=1)
    with pytest.raises(InputError, match=r"p99 needs 662 answers.*longer --duration"):
        find_rate(LoadOptions("localhost:1", slo_ms=50, rate=5, duration=1))
