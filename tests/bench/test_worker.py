"""What a worker does when it is asked, without the process around it."""

from __future__ import annotations

import time

import pytest
from torch import nn

from deployfa.bench import protocol as say
from deployfa.bench.worker import Worker, module_inputs, settle


class Tokens(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None, **rest): ...


class Image(nn.Module):
    def forward(self, x): ...


@pytest.mark.parametrize(
    ("module", "beside", "expected"),
    [
        (Tokens(), ["attention_mask", "input_ids", "row"], ["attention_mask", "input_ids"]),
        (Tokens(), [], ["input_ids", "attention_mask"]),
        (Image(), ["pixel_values"], ["pixel_values"]),
        (Image(), [], ["x"]),
    ],
)
def test_a_module_is_fed_what_the_graph_beside_it_is(module, beside, expected):
    assert module_inputs(module, beside) == expected


def test_warming_up_is_bounded(make_graph):
    worker = Worker()
    request = say.Open(
        label="a",
        kind="onnx",
        graph=str(make_graph()),
        adapter=None,
        model=None,
        target="onnxruntime-cpu",
        threads=1,
        spinning=False,
    )
    worker.answer(request)
    worker.answer(say.Prepare(1, 4, 0, 1000))
    warmed = worker.answer(say.Warm(0.0))
    assert warmed.runs >= 5 and not warmed.steady


def test_settling_waits_for_busy_threads_and_gives_up():
    import hashlib
    import threading

    stop = threading.Event()

    def burn():
        while not stop.is_set():
            hashlib.sha256(bytes(100_000)).digest()  # outside Python's lock, as a polling thread is

    threads = [threading.Thread(target=burn) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        start = time.perf_counter()
        settle(limit_s=0.2)
        assert time.perf_counter() - start >= 0.2
        start = time.perf_counter()
        threading.Timer(0.1, stop.set).start()
        settle(limit_s=30)
        assert 0.1 <= time.perf_counter() - start < 15
    finally:
        stop.set()
        for thread in threads:
            thread.join()
