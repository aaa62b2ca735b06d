"""What one client cannot take from the others."""

from __future__ import annotations

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from serving_client import request


def feeds(rows: int, length: int) -> dict[str, np.ndarray]:
    ids = np.full((rows, length), 2000)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@pytest.fixture(scope="module")
def small(serve, packs: dict[str, Path]):
    """One row a batch, one request in the queue, little patience."""
    limits = ("--max-batch", 16, "--max-queue", 1, "--read-timeout", 0.5, "--max-body-mb", 1, "--max-connections", 12)
    with serve(f"pack={packs['pack']}", *limits) as served:
        yield served


def raw_answer(served, data: bytes, timeout: float = 10) -> bytes:
    with socket.create_connection(served.address, timeout) as connection:
        connection.sendall(data)
        content = b""
        with contextlib.suppress(ConnectionError):
            while block := connection.recv(65536):
                content += block
                head, _, body = content.partition(b"\r\n\r\n")
                if b"content-length: " in head and len(body) >= int(
                    head.partition(b"\ncontent-length: ")[2].partition(b"\r")[0]
                ):
                    break
        return content


def test_a_body_that_says_it_is_too_large_is_not_waited_for(small) -> None:
    head = b"POST /v2/models/pack/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000\r\n\r\n"
    assert raw_answer(small, head).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_say_it_is_stopped_in_the_midst(small) -> None:
    head = b"POST /v2/models/pack/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert raw_answer(small, head + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 20).startswith(b"HTTP/1.1 413")


def test_long_headers(small) -> None:
    head = b"GET /v2 HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 40_000
    assert raw_answer(small, head).startswith(b"HTTP/1.1 431")  # before they end
    assert raw_answer(small, head + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    assert raw_answer(small, b"GET /v2 HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 20_000 + b"\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )


@pytest.mark.parametrize("cut", [10, 60, -5])
def test_half_a_request_and_silence(small, cut: int) -> None:
    raw = request("pack", feeds(1, 8), adapter="vefa")
    began = time.monotonic()
    answer = raw_answer(small, raw[:cut])
    assert answer.startswith(b"HTTP/1.1 408") and b'"error"' in answer
    assert time.monotonic() - began >= 0.5


def test_a_request_that_comes_slowly_but_in_time_is_answered(small) -> None:
    raw = request("pack", feeds(1, 8), adapter="vefa")
    with socket.create_connection(small.address) as connection:
        connection.sendall(raw[:40])
        time.sleep(0.2)
        connection.sendall(raw[40:])
        assert connection.recv(20).startswith(b"HTTP/1.1 200")


def test_what_cannot_wait_is_refused_with_the_time_to_come_back(small) -> None:
    """Ten clients, a model that is busy for long, room for one in the queue."""
    raw = request("pack", feeds(16, 128), adapter="vefa")
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda _: raw_answer(small, raw, 60), range(10)))
    shed = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
    assert shed and all(b"retry-after: " in answer for answer in shed)
    assert any(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert len(shed) + sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) == 10


def test_a_deadline_that_has_passed(small) -> None:
    inputs = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A joy."]}]
    body = {"inputs": inputs, "parameters": {"adapter": "vefa", "timeout": 1}}
    status, told, headers = small.ask("/v2/models/pack/infer", body)
    assert status == 503 and "deadline" in told["error"] and "retry-after" in headers


def test_who_hangs_up_in_the_queue_is_not_computed(small) -> None:
    """Its one place in the queue is free again, and the model never saw its rows."""
    long, mine = request("pack", feeds(16, 300), adapter="vefa"), request("pack", feeds(7, 8), adapter="lorfa")
    with ThreadPoolExecutor(1) as threads:
        busy = threads.submit(raw_answer, small, long, 60)
        time.sleep(0.05)
        with socket.create_connection(small.address) as connection:
            connection.sendall(mine)
            time.sleep(0.1)
        assert busy.result().startswith(b"HTTP/1.1 200")
    assert raw_answer(small, request("pack", feeds(1, 8), adapter="vefa")).startswith(b"HTTP/1.1 200")
    (stats,) = small.ask("/v2/models/pack/stats")[1]["model_stats"]
    assert 7 not in {each["batch_size"] for each in stats["batch_stats"]}
    assert raw_answer(small, mine).startswith(b"HTTP/1.1 200")
    (stats,) = small.ask("/v2/models/pack/stats")[1]["model_stats"]
    assert 7 in {each["batch_size"] for each in stats["batch_stats"]}


def test_connections_beyond_the_limit_are_told_so(small) -> None:
    with contextlib.ExitStack() as held:
        connections = [held.enter_context(socket.create_connection(small.address)) for _ in range(14)]
        connections[-1].settimeout(5)
        answer = connections[-1].recv(4096)
    assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer
    time.sleep(0.1)
    assert small.ask("/v2/health/live")[0] == 200


def test_many_rows_and_long_ones_are_refused(small) -> None:
    for rows, length in ((17, 8), (16, 2000)):
        answer = raw_answer(small, request("pack", feeds(rows, length), adapter="vefa"))
        assert answer.startswith(b"HTTP/1.1 400"), answer


def test_a_request_that_breaks_the_model_breaks_nothing_else(small) -> None:
    """600 tokens are more positions than MiniLM has, which only the runtime knows."""
    answer = raw_answer(small, request("pack", feeds(1, 600), adapter="vefa"))
    assert answer.startswith(b"HTTP/1.1 400") and b"does not answer this request" in answer
    assert small.ask("/v2/health/ready")[0] == 200
    assert small.answer("pack", "A joy.", adapter="vefa")
