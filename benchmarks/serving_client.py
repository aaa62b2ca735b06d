"""A client of the Open Inference Protocol that costs next to nothing, so that what is measured is the server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deployfa.edits import Array

ADMIN = "benchmark"


def request(model: str, feeds: Mapping[str, Array], *, adapter: str | None = None, output: str = "logits") -> bytes:
    """One inference as bytes on the wire, tensors in binary, one output asked for."""
    arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    inputs = [
        {"name": n, "shape": list(a.shape), "datatype": "INT64", "parameters": {"binary_data_size": a.nbytes}}
        for n, a in arrays.items()
    ]
    outputs = [{"name": output, "parameters": {"binary_data": True}}]
    parameters = {"adapter": adapter} if adapter is not None else {}
    head = json.dumps({"inputs": inputs, "outputs": outputs, "parameters": parameters}).encode()
    body = head + b"".join(array.tobytes() for array in arrays.values())
    lines = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        f"inference-header-content-length: {len(head)}\r\n\r\n"
    )
    return lines.encode() + body


class Connection(asyncio.Protocol):
    """One request at a time: ``await ask(raw)`` → status, body; ``head`` has the answer's headers."""

    def __init__(self) -> None:
        self._buffer = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._transport: Any = None
        self.head = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, raw: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(raw)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        start = self._buffer.index(b"content-length: ") + 16
        if b"inference-header-content-length: " in self._buffer[:end]:
            # the other header ends in the same words
            start = self._buffer.index(b"\ncontent-length: ") + 17
        length = int(self._buffer[start : self._buffer.index(b"\r", start)])
        if len(self._buffer) < end + 4 + length:
            return
        self.head, body = self._buffer[:end], self._buffer[end + 4 :]
        status, self._buffer = int(self.head[9:12]), b""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((status, body))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("the server closed the connection"))


async def connect(port: int) -> Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
    return connection


def numbers(connection: Connection, body: bytes) -> Array:
    """The float32 of the one binary output."""
    start = connection.head.index(b"inference-header-content-length: ") + 33
    head = int(connection.head[start : connection.head.find(b"\r", start) % (len(connection.head) + 1)])
    return np.frombuffer(body[head:], np.float32)


class Server:
    """``deployfa serve`` in a process of its own, ready when made; ``with Server(...) as server:``."""

    def __init__(self, models: Mapping[str, Path], *options: object) -> None:
        command = [sys.executable, "-m", "deployfa.cli", "serve", "--port", "0"]
        command += [f"{name}={path}" for name, path in models.items()] + [str(each) for each in options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = 0
        for line in self.process.stderr or ():
            said = json.loads(line)
            if said["event"] == "ready":
                self.port = int(said["url"].rpartition(":")[2])
                break
        if not self.port:
            raise RuntimeError("the server did not start")
        # what it goes on to say must be read, or the pipe fills up
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for _ in self.process.stderr or ():
            pass

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return json.load(answer)

    def batches(self, model: str) -> dict[int, int]:
        """Rows of a batch → how often, since the start."""
        (stats,) = self.get(f"/v2/models/{model}/stats")["model_stats"]
        return {each["batch_size"]: each["compute_infer"]["count"] for each in stats["batch_stats"]}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


async def closed_loop(port: int, raws: list[bytes], seconds: float, warm_up: float) -> tuple[float, list[float]]:
    """One connection for each of ``raws``, which sends it again as soon as it is answered → answers per second, and
    their latencies in ms."""
    latencies: list[float] = []
    start = time.perf_counter() + warm_up
    end = start + seconds

    async def one(raw: bytes) -> None:
        connection = await connect(port)
        while (sent := time.perf_counter()) < end:
            status, body = await connection.ask(raw)
            now = time.perf_counter()
            if status != 200:
                raise RuntimeError(f"{status}: {body[:200]!r}")
            if start <= now <= end:
                latencies.append(1e3 * (now - sent))

    await asyncio.gather(*(one(raw) for raw in raws))
    return len(latencies) / seconds, latencies
