"""A request that found its model before the model was loaded again is answered by the one in its place."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deployfa.serving.fair_queue import Policy
from deployfa.serving.http import Intake
from deployfa.serving.infer import Infer
from deployfa.serving.limits import Limits
from deployfa.serving.metrics import Metrics
from deployfa.serving.opening import ModelOpener, Running
from deployfa.serving.repository import Repository
from deployfa.serving.service import Access, Service


def test_its_body_arrives_after_the_reload(packs: dict[str, Path]) -> None:
    async def main() -> tuple[int, Any]:
        executor, metrics, log = ThreadPoolExecutor(1), Metrics(), logging.getLogger("test")
        loop = asyncio.get_running_loop()
        opener = ModelOpener(
            Running(), Policy(max_rows=1), state=None, loop=loop, executor=executor, observe=metrics.ran, log=log
        )
        repository = Repository({"pack": packs["pack"]}, opener)
        limits = Limits()
        service = Service(repository=repository, metrics=metrics, limits=limits, access=Access(), executor=executor)
        await repository.load("pack")
        found = repository.find("pack")
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await repository.load("pack")
            assert repository.find("pack") is not found and found.reason is not None
            inputs = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A joy."]}]
            body = json.dumps({"inputs": inputs, "parameters": {"adapter": "vefa"}}).encode()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        told = {"headers": [], "intake": Intake(limits.held_bytes)}
        await Infer(service)({"path_params": {"model": "pack"}, "headers": [], "deployfa": told}, receive, send)
        repository.find("pack").close()
        return sent[0]["status"], json.loads(sent[1]["body"])

    status, answer = asyncio.run(main())
    assert status == 200 and answer["parameters"] == {"adapter": "vefa"}
