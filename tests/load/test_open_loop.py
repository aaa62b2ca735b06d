"""Open loop: a stall is seen by all who would have met it; whose stall it was is told apart."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from deployfa.bench.statistics import percentile
from deployfa.load import LoadOptions, run_load
from deployfa.load.alarm import Alarm
from deployfa.load.arrivals import poisson_times
from deployfa.load.client import Outcome, open_client
from deployfa.load.open_loop import Samples, Send, open_loop
from deployfa.load.prepare import prepare

from .server import Server


async def instantly(_index: int) -> tuple[int, float]:
    return 200, 0.0


async def closed_loop(times: np.ndarray, send: Send) -> np.ndarray:
    """How not to do it: wait for each answer, and time from when the request left."""
    origin, latency = time.perf_counter(), []
    for index, due in enumerate(times):
        await asyncio.sleep(max(0.0, origin + due - time.perf_counter()))
        started = time.perf_counter()
        await send(index)
        latency.append(time.perf_counter() - started)
    return np.array(latency)


class TestCoordinatedOmission:
    """800 requests in 2 s, in which the server stalls once, for 1 s: half of all users met it."""

    RATE, SECONDS, STALL = 400, 2.0, 1.0

    def test_a_stall_is_in_the_percentiles(self, serve: Callable[..., Server]) -> None:
        server = serve(stall=self.STALL, stall_at=200)
        report = run_load(LoadOptions(server.url, rate=self.RATE, duration=self.SECONDS, warmup=0, slo_ms=100))
        assert report.failed == report.shed == 0 and report.sent == report.ok > 662
        # what arrives in a stall waits for what is left of it, so the share that waits more than w is (1 - w) / 2
        assert report.latency["p90"].ms > 500
        assert report.latency["p99"].ms > 800
        assert report.objective is not None and report.objective.share < 0.7

    def test_a_closed_loop_would_have_hidden_it(self, serve: Callable[..., Server]) -> None:
        server = serve(stall=self.STALL, stall_at=200)
        times = poisson_times(self.RATE, self.SECONDS, np.random.default_rng(0))

        async def run() -> np.ndarray:
            async with prepare(LoadOptions(server.url)) as prepared:
                send = prepared.client.sender("/v2/models/minilm/infer")
                return await closed_loop(times, lambda index: send(*prepared.requests.build(0, 0)))

        latency = asyncio.run(run())
        assert latency.max() > 0.9 * self.STALL  # it was there
        assert 1e3 * percentile(latency, 0.9) < 500 and 1e3 * percentile(latency, 0.99) < 800


def test_a_stall_of_the_generator_is_its_own_and_is_in_the_latency_too() -> None:
    async def send(index: int) -> tuple[int, float]:
        if index == 300:
            time.sleep(0.3)  # nothing else runs: the generator stands still
        return 200, 0.0

    times = np.arange(1000) / 1000.0
    samples = asyncio.run(open_loop(times, send, warmup=0, seconds=1.0))
    assert samples.late_s[300] < 0.2 and samples.late_s[301:400].min() > 0.1
    assert samples.latency_s[301:400].min() > 0.1


def test_waiting_for_a_connection_is_the_generators_lateness(serve: Callable[..., Server]) -> None:
    server = serve(delay=0.02)
    options = LoadOptions(server.url, rate=200, duration=0.5, warmup=0, max_connections=1)
    report = run_load(options)
    assert report.generator.late_max_ms > 300 and report.failed == 0
    assert any("--max-connections" in warning for warning in report.warnings)


def test_a_connection_that_never_came_is_waited_for_until_the_timeout(serve: Callable[..., Server]) -> None:
    server = serve(delay=2)

    async def run() -> tuple[tuple[int, float], ...]:
        async with open_client(server.url, token=None, timeout=0.2, max_connections=1) as client:
            send = client.sender("/v2/models/minilm/infer")
            return tuple(await asyncio.gather(send(b"{}", {}), send(b"{}", {})))

    first, second = asyncio.run(run())
    assert first == (Outcome.TIMEOUT, 0.0)
    assert second[0] == Outcome.TIMEOUT and 0.1 < second[1] < 10


def test_warm_up_is_sent_and_not_counted() -> None:
    times = np.linspace(0, 0.3, 30, endpoint=False)
    sent = []

    async def send(index: int) -> tuple[int, float]:
        sent.append(index)
        return 200 if index >= 20 else 500, 0.0

    samples = asyncio.run(open_loop(times, send, warmup=times[20], seconds=0.1))
    assert sent == list(range(30))
    assert samples.index.tolist() == list(range(20, 30)) and samples.ok.all()


def test_a_generator_that_is_behind_sends_everything_all_the_same() -> None:
    samples = asyncio.run(open_loop(np.zeros(5000), instantly, warmup=0, seconds=0.001))
    assert samples.ok.sum() == 5000 and (np.diff(samples.late_s) >= 0).all()


def test_cancelling_reports_what_there_is() -> None:
    async def send(index: int) -> tuple[int, float]:
        if index % 2:
            await asyncio.sleep(60)
        return 200, 0.0

    async def run() -> Samples:
        task = asyncio.create_task(open_loop(np.arange(1000) / 100.0, send, warmup=0, seconds=10.0))
        await asyncio.sleep(0.3)
        task.cancel()
        return await task

    samples = asyncio.run(run())
    assert samples.interrupted and 2 <= len(samples.outcome) < 1000 and 0 < samples.seconds < 10
    assert samples.ok[::2].all()
    assert (samples.outcome[1::2] == Outcome.UNFINISHED).all() and np.isnan(samples.latency_s[1::2]).all()


def test_a_mistake_in_sending_is_not_a_failed_request() -> None:
    async def send(index: int) -> tuple[int, float]:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        asyncio.run(open_loop(np.zeros(1), send, warmup=0, seconds=0.01))


@pytest.mark.parametrize("platform", [sys.platform, "somewhere"])
def test_an_alarm_never_rings_early(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)

    async def naps() -> list[float]:
        found = []
        with Alarm() as alarm:
            for seconds in (0.0001, 0.003, 0.02):
                started = time.perf_counter()
                await alarm.sleep(seconds)
                found.append((time.perf_counter() - started) / seconds)
        return found

    assert min(asyncio.run(naps())) > 0.99
