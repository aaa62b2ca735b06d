"""The thread between the event loop and the model."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from deployfa.errors import RequestError
from deployfa.runtimes.runner import TensorSpec
from deployfa.serving.batcher import Batcher, Closed
from deployfa.serving.fair_queue import Policy
from deployfa.serving.runs import BatchRunner
from deployfa.serving.signature import Signature
from deployfa.serving.statistics import ModelStatistics
from deployfa.serving.taken import TakenRow
from deployfa.serving.work import Answered, Work


class Doubler:
    """A graph that doubles ``x``; it breaks on 13, and on everything once ``broken``."""

    inputs = (TensorSpec("x", "int64", ("batch", 1)),)
    outputs = (TensorSpec("y", "int64", ("batch", 1)),)
    broken = False

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def group(self, taken: Any, strength: Any) -> None:
        return None

    def run(self, feeds: Any, works: Sequence[Work]) -> dict[str, np.ndarray]:
        self.go.wait(10)
        self.batches.append(len(feeds["x"]))
        if self.broken or (feeds["x"] == 13).any():
            raise RuntimeError("unlucky")
        return {"y": 2 * feeds["x"]}


class Client:
    def __init__(self, backend: Doubler, **policy: Any) -> None:
        self.backend = backend
        signature = Signature(backend.inputs, backend.outputs)
        probe = {"x": np.ones((1, 1), np.int64)}
        self.runner = BatchRunner(backend, signature, ModelStatistics(), probe, lambda batch: None)
        self.batcher = Batcher(self.runner, Policy(**policy))
        self.answers: dict[int, Any] = {}

    def ask(self, number: int, deadline: float = math.inf) -> Work:
        def done(answer: Any) -> None:
            self.answers[number] = answer

        feeds = {"x": np.full((1, 1), number)}
        work = Work(feeds, 1, 1, None, TakenRow("a", (), 1), None, time.monotonic(), deadline, done)
        self.batcher.submit(work)
        return work

    def wait(self, count: int) -> None:
        until = time.monotonic() + 10
        while len(self.answers) < count:
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def client():
    made: list[Client] = []

    def make(**policy: Any) -> Client:
        made.append(Client(Doubler(), **policy))
        return made[-1]

    yield make
    for each in made:
        each.backend.go.set()
        assert each.batcher.close(10)


def test_what_gathers_while_the_model_computes_is_one_batch(client: Callable[..., Client]) -> None:
    one = client()
    one.backend.go.clear()
    one.ask(0)
    time.sleep(0.05)
    for number in range(1, 8):
        one.ask(number)
    one.backend.go.set()
    one.wait(8)
    assert one.backend.batches == [1, 7]
    assert {n: int(a.outputs["y"][0, 0]) for n, a in one.answers.items()} == {n: 2 * n for n in range(8)}


def test_one_that_breaks_the_batch_breaks_it_for_itself(client: Callable[..., Client]) -> None:
    one = client()
    one.backend.go.clear()
    one.ask(0)
    time.sleep(0.05)
    for number in (11, 12, 13, 14):
        one.ask(number)
    one.backend.go.set()
    one.wait(5)
    assert all(isinstance(one.answers[number], Answered) for number in (11, 12, 14))
    assert one.answers[13].status == 400 and "unlucky" in str(one.answers[13])
    assert one.runner.broken is None


def test_a_model_that_answers_nothing_is_broken_and_not_the_client(client: Callable[..., Client]) -> None:
    one = client()
    one.backend.broken = True
    one.ask(1)
    one.wait(1)
    assert one.answers[1].status == 500 and one.runner.broken == "unlucky"
    one.backend.broken = False
    one.ask(2)
    one.wait(2)
    assert one.runner.broken is None


def test_closing_answers_what_waits_and_takes_no_more(client: Callable[..., Client]) -> None:
    one = client()
    one.backend.go.clear()
    for number in range(5):
        one.ask(number)
    assert not one.batcher.close(0.05)  # it owes answers
    with pytest.raises(Closed) as refused:
        one.ask(9)
    assert refused.value.status == 503
    one.backend.go.set()
    assert one.batcher.close(10) and len(one.answers) == 5 and not one.batcher.alive


def test_the_late_get_503_and_the_cancelled_nothing(client: Callable[..., Client]) -> None:
    one = client()
    one.backend.go.clear()
    one.ask(0)
    time.sleep(0.05)
    one.ask(1, deadline=time.monotonic())
    gone = one.ask(2)
    one.batcher.cancel(gone)
    one.ask(3)
    one.backend.go.set()
    one.wait(3)
    assert isinstance(one.answers[1], RequestError) and one.answers[1].status == 503
    assert 2 not in one.answers and one.backend.batches == [1, 1]


def test_an_idle_model_waits_for_company_only_if_it_is_told_to(client: Callable[..., Client]) -> None:
    patient = client(max_delay_s=0.2)
    patient.ask(0)
    time.sleep(0.05)
    patient.ask(1)
    patient.wait(2)
    assert patient.backend.batches == [2]


def bare(run: Any, count: int = 3) -> tuple[Batcher, dict[int, Any]]:
    """Some requests of one batcher, all in its queue before the first is run."""
    answers: dict[int, Any] = {}
    go = threading.Event()

    def later(works: Sequence[Work], began: float) -> Any:
        go.wait(10)
        return run(works)

    batcher = Batcher(later, Policy(max_rows=2))
    for number in range(count):

        def done(answer: Any, number: int = number) -> None:
            answers[number] = answer

        batcher.submit(Work({}, 1, 1, None, TakenRow("a", (), 1), None, 0.0, math.inf, done))
    go.set()
    return batcher, answers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting() -> None:
    """Those in its hands and those in its queue are told, and who comes later."""

    def dies(works: Sequence[Work]) -> Any:
        raise SystemExit

    batcher, answers = bare(dies)
    batcher._thread.join(10)
    assert not batcher.alive and len(answers) == 3
    assert all(isinstance(answer, Closed) and answer.status == 503 for answer in answers.values())
    with pytest.raises(Closed):
        batcher.submit(Work({}, 1, 1, None, TakenRow("a", (), 1), None, 0.0, math.inf, answers.update))


def test_a_wrong_number_of_answers_is_nobodys_answer() -> None:
    batcher, answers = bare(lambda works: ["an answer"] * (len(works) + 1))
    assert batcher.close(10)
    assert len(answers) == 3 and all("answers to" in str(answer) for answer in answers.values())
