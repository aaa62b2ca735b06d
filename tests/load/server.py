"""A small server of the Open Inference Protocol on a port of its own, in a thread, that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

SIZES = {"INT64": np.int64, "FP32": np.float32}


@dataclass
class Server:
    """What it serves and how; attributes may be changed between runs.  asked counts requests for inference.

    behave: ``ok``, ``shed``, ``busy`` (503 without Retry-After), ``hang``, ``disconnect``; from request ``after`` on.
    stall: seconds for which nothing is answered, once, from request ``stall_at`` on.  serial: seconds that each answer
    takes, one at a time.
    """

    models: dict[str, str] = field(default_factory=lambda: {"minilm": "READY"})
    inputs: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "attention_mask", "datatype": "INT64", "shape": ["-1", "-1"]},
            {"name": "token_type_ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "text", "datatype": "BYTES", "shape": [-1]},
        ]
    )
    adapters: list[str] | None = None
    token: str | None = None
    behave: str = "ok"
    after: int = 1
    delay: float = 0.0
    serial: float = 0.0
    stall: float = 0.0
    stall_at: int = 10**9
    asked: int = 0
    wrong: list[str] = field(default_factory=list)
    named: list[tuple[str | None, float | None]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    feeds: list[dict[str, np.ndarray]] = field(default_factory=list)
    url: str = ""
    _open: asyncio.Event | None = None
    _turn: asyncio.Lock | None = None

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._authorise])
        app.router.add_get("/v2", self._server)
        app.router.add_post("/v2/repository/index", self._index)
        app.router.add_get("/v2/models/{model}", self._model)
        app.router.add_get("/v2/models/{model}/adapters", self._adapters)
        app.router.add_post("/v2/models/{model}/infer", self._infer)
        return app

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "who are you"}, status=401)
        return await handler(request)

    async def _server(self, _request: web.Request) -> web.Response:
        return web.json_response({"name": "toy", "version": "1.0", "extensions": ["binary_tensor_data"]})

    async def _index(self, _request: web.Request) -> web.Response:
        return web.json_response([{"name": n, "version": "1", "state": s} for n, s in self.models.items()])

    async def _model(self, request: web.Request) -> web.Response:
        if request.match_info["model"] not in self.models:
            return web.json_response({"error": "unknown model"}, status=404)
        return web.json_response({"name": request.match_info["model"], "inputs": self.inputs, "outputs": []})

    async def _adapters(self, _request: web.Request) -> web.Response:
        if self.adapters is None:
            return web.json_response({"error": "no such route"}, status=404)
        return web.json_response({"adapters": [{"name": name} for name in self.adapters]})

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked += 1
        number = self.asked
        assert self._open is not None and self._turn is not None
        if number == self.stall_at:
            self._open.clear()
            asyncio.get_running_loop().call_later(self.stall, self._open.set)
        await self._open.wait()
        if self.delay:
            await asyncio.sleep(self.delay)
        try:
            self._read(request, body)
        except Exception as error:
            self.wrong.append(repr(error))
            return web.json_response({"error": str(error)}, status=400)
        if self.serial:
            async with self._turn:
                await asyncio.sleep(self.serial)
        behave = self.behave if number > self.after else "ok"
        if behave == "shed":
            return web.json_response({"error": "busy"}, status=503, headers={"Retry-After": "1"})
        if behave == "busy":
            return web.json_response({"error": "broken"}, status=503)
        if behave == "hang":
            await asyncio.sleep(30)
        if behave == "disconnect":
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"model_name": "minilm", "outputs": []})

    def _read(self, request: web.Request, body: bytes) -> None:
        """Take a request apart; raise on anything that the protocol does not allow."""
        length = request.headers.get("Inference-Header-Content-Length")
        header = json.loads(body[: int(length)] if length else body)
        parameters = header["parameters"]
        assert parameters["binary_data_output"] is True
        name = parameters.get("adapter")
        if name == "missing":
            raise ValueError("no adapter 'missing'")
        self.named.append((name, parameters.get("strength")))
        rest, feeds = body[int(length) :] if length else b"", {}
        for tensor in header["inputs"]:
            if tensor["datatype"] == "BYTES":
                assert (tensor["shape"], length) == ([1], None)
                (text,) = tensor["data"]
                self.texts.append(text)
                continue
            size = tensor["parameters"]["binary_data_size"]
            blob, rest = rest[:size], rest[size:]
            feeds[tensor["name"]] = np.frombuffer(blob, SIZES[tensor["datatype"]]).reshape(tensor["shape"])
        assert not rest
        if feeds and len(self.feeds) < 64:
            self.feeds.append(feeds)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Run it until the block ends; ``server.url`` is where."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def work() -> None:
        server._open, server._turn = asyncio.Event(), asyncio.Lock()
        server._open.set()
        runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(work()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
