"""Nobody who was accepted goes without an answer, and nothing that was uploaded is lost."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
from serving_client import connect, numbers, request

from deployfa.adapter import Adapter

LENGTH = 24
AUTHORIZATION = {"Authorization": "Bearer secret"}


def feeds(number: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(number).integers(1000, 20_000, (1, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def test_sigterm_under_load_answers_all_that_was_accepted(serve, packs: dict[str, Path]) -> None:
    """16 clients ask without a pause; the first of them that finds the door closed had asked nothing yet."""
    answered, cut = [], []

    async def client(port: int, number: int) -> None:
        raw = request("pack", feeds(number), adapter=("vefa", "lorfa")[number % 2])
        while True:
            try:
                connection = await connect(port)
            except OSError:
                return  # it listens no more: nothing was accepted
            try:
                while True:
                    status, body = await connection.ask(raw)
                    answered.append((number, status, numbers(connection, body).tobytes() if status == 200 else body))
                    if b"connection: close" in connection.head:
                        break
            except (ConnectionError, OSError) as error:
                cut.append(repr(error))
                return

    async def all_of_them(port: int) -> None:
        await asyncio.gather(*(client(port, number) for number in range(16)))

    with serve(f"pack={packs['pack']}", "--drain-timeout", 10) as served:
        threading.Timer(1.5, served.process.send_signal, [signal.SIGTERM]).start()
        asyncio.run(all_of_them(served.address[1]))
        assert served.process.wait(20) == 0
    assert not cut, cut[:3]
    assert len(answered) > 50 and {status for _, status, _ in answered} == {200}
    by_client = {number: [np.frombuffer(b, np.float32) for n, _, b in answered if n == number] for number in range(16)}
    for answers in by_client.values():
        assert all(np.allclose(answer, answers[0], atol=1e-5) for answer in answers)
    assert not np.allclose(by_client[0][0], by_client[1][0], atol=1e-3)


def test_a_stopping_server_is_not_ready_but_answers(serve, packs: dict[str, Path]) -> None:
    with serve(f"pack={packs['pack']}", "--drain-timeout", 4) as served:
        assert served.ask("/v2/health/ready")[0] == 200
        served.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 5
        while (status := served.ask("/v2/health/ready")[0]) == 200:
            assert time.monotonic() < until
        assert status == 503
        assert served.answer("pack", "A joy.", adapter="vefa")
        assert served.process.wait(20) == 0


def test_a_second_signal_does_not_wait(serve, packs: dict[str, Path]) -> None:
    with serve(f"pack={packs['pack']}", "--drain-timeout", 60) as served:
        served.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + 5
        while not any(line["event"] == "stopping" for line in served.lines):
            assert time.monotonic() < until
            time.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(10) == 1


def test_killed_and_started_again_it_has_the_same_adapters(
    serve, packs: dict[str, Path], trained: dict[str, Path], tmp_path: Path
) -> None:
    arguments = (f"pack={packs['pack']}", "--state", tmp_path / "state", "--admin-token", "secret")
    file = tmp_path / "shop.safetensors"
    Adapter.load(trained["vefa"]).save(file)
    with serve(*arguments) as served:
        path = "/v2/models/pack/adapters/"
        status, told, _ = served.ask(path + "shop", file.read_bytes(), method="PUT", headers=AUTHORIZATION)
        assert status == 200 and told["resident"], told
        assert served.ask(path + "vefa", method="DELETE", headers=AUTHORIZATION)[0] == 200
        before = served.answer("pack", "A joy.", adapter="shop")
        assert served.stop(signal.SIGKILL) == -signal.SIGKILL
    with serve(*arguments) as served:
        _, told, _ = served.ask("/v2/models/pack/adapters")
        assert {each["name"] for each in told["adapters"]} == {"lorfa", "shop"}
        assert served.answer("pack", "A joy.", adapter="shop") == before
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A joy."]}]
        body = json.dumps({"inputs": inputs, "parameters": {"adapter": "vefa"}}).encode()
        assert served.ask("/v2/models/pack/infer", body)[0] == 404
