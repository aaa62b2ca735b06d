"""A model is loaded again, and its adapters come and go, while it is asked without a pause."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from serving_client import Connection, connect, numbers, request

from deployfa.adapter import Adapter

ADMIN = b"authorization: Bearer secret\r\n"


def feeds() -> dict[str, np.ndarray]:
    ids = np.arange(2000, 2012).reshape(1, 12)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


async def change(connection: Connection, method: str, path: str, body: bytes = b"{}") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n".encode() + ADMIN + b"\r\n"
    status, answer = await connection.ask(head + body)
    assert status == 200, answer
    return answer


def test_no_request_is_dropped_and_no_answer_is_anothers(
    serve, packs: dict[str, Path], trained: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "vefa.safetensors"
    Adapter.load(trained["vefa"]).save(file)
    weights = file.read_bytes()

    async def main(port: int) -> tuple[dict[str, list[np.ndarray]], list[str]]:
        answers: dict[str, list[np.ndarray]] = {name: [] for name in ("vefa", "lorfa", "again")}
        failed: list[str] = []
        over = asyncio.Event()
        admin = await connect(port)
        await change(admin, "PUT", "/v2/models/pack/adapters/again", weights)

        async def client(name: str) -> None:
            connection = await connect(port)
            raw = request("pack", feeds(), adapter=name)
            while not over.is_set():
                status, body = await connection.ask(raw)
                if status == 200:
                    answers[name].append(numbers(connection, body))
                else:
                    failed.append(f"{status} {body!r}")

        clients = [asyncio.create_task(client(name)) for name in answers for _ in range(3)]
        for turn in range(3):
            await change(admin, "POST", "/v2/repository/models/pack/load")
            for number in range(8):
                await change(admin, "PUT", "/v2/models/pack/adapters/again", weights)
                await change(admin, "PUT", f"/v2/models/pack/adapters/new-{turn}-{number}", weights)
                await change(admin, "DELETE", f"/v2/models/pack/adapters/new-{turn}-{number}")
        over.set()
        await asyncio.gather(*clients)
        return answers, failed

    with serve(f"pack={packs['pack']}", "--state", tmp_path / "state", "--admin-token", "secret") as served:
        answers, failed = asyncio.run(main(served.address[1]))
    assert not failed, failed[:3]
    assert all(len(each) > 20 for each in answers.values())
    for name, each in answers.items():
        # 'again' is the same adapter as 'vefa' all the time, whichever of its files answers
        wanted = answers["vefa" if name == "again" else name][0]
        assert all(np.allclose(one, wanted, rtol=0, atol=1e-5) for one in each), name
    assert not np.allclose(answers["vefa"][0], answers["lorfa"][0], atol=1e-3)
