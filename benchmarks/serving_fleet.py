"""A thousand adapters, most of them on disk, added, replaced and removed under traffic; every answer is checked."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from many_adapters import adapter, cores, fed, text_feeds
from serving_client import ADMIN, Connection, Server, connect, numbers, request

from deployfa.adapter import Adapter
from deployfa.base_graphs import base_graph
from deployfa.edits import Array
from deployfa.graph import make_plan
from deployfa.graph.rewrite import apply_adapter
from deployfa.graph.storage import save_graph
from deployfa.pack import pack
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

RESIDENT = 300
LENGTHS = (6, 12, 24, 40)
#: Two float32 ways of one computation; another adapter's answer is off by tenths.
TOLERANCE = 1e-4


def fleet(folder: Path, options: Any) -> list[dict[str, Any]]:
    """Half as many again are made as are there at once: they take the places of others."""
    count = options.adapters
    made = count + count // 5
    feeds = [text_feeds(1, length) for length in LENGTHS]
    first = adapter("vefa", 0)
    packed = pack({"own": first}, folder / "pack", table_inputs=True).bundle
    known = options.truths is not None and options.truths.is_file()
    truths = [list(each) for each in np.load(options.truths)["logits"]] if known else []
    files = []
    started = time.perf_counter()
    for number in range(made):
        each = adapter("vefa", number)
        file = folder / f"{number}.safetensors"
        each.save(file)
        files.append(file.read_bytes())
        file.unlink()
        if number >= len(truths):
            truths.append(_answers(each, feeds))
        if number % 100 == 99:
            print(f"{number + 1} of {made} adapters, {time.perf_counter() - started:.0f} s", flush=True)
    if options.truths is not None and not known:
        np.savez(options.truths, logits=np.array(truths))
    options_ = ("--max-adapters", RESIDENT, "--state", folder / "state", "--admin-token", ADMIN, "--threads", cores())
    with Server({"pack": packed.path}, *options_) as server:
        run = _Run(server, feeds, files, truths, options)
        result = asyncio.run(run.all(count))
        listed = server.get("/v2/models/pack/adapters")["adapters"]
        result["resident_at_the_end"] = sum(each["resident"] for each in listed)
    return [result]


def _answers(own: Adapter, feeds: list[dict[str, Array]]) -> list[Array]:
    """The logits of the adapter's own folded graph."""
    base = base_graph(own).load()
    model = apply_adapter(base, own, make_plan(base, own, placement="fold"))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        save_graph(model, Path(folder))
        runner = OnnxRuntimeRunner(Path(folder) / "model.onnx", threads=cores(), spinning=False)
    return [runner.run(fed(each, runner))["logits"][0] for each in feeds]


class _Run:
    def __init__(
        self,
        server: Server,
        feeds: list[dict[str, Array]],
        files: list[bytes],
        truths: list[list[Array]],
        options: Any,
    ) -> None:
        self._server = server
        self._files, self._truths, self._options = files, truths, options
        self._feeds = feeds
        #: name → the numbers of the adapters that it may answer with now: two while it is being replaced
        self._may: dict[str, set[int]] = {}
        self._flying: dict[str, int] = {}
        self._random = np.random.default_rng(0)
        self._idle: asyncio.Queue[Connection] = asyncio.Queue()
        self._latencies: list[float] = []
        self.errors: list[str] = []
        self.wrong = 0
        self.changes = {"added": 0, "replaced": 0, "removed": 0}

    async def all(self, count: int) -> dict[str, Any]:
        port, seconds, rate = self._server.port, self._options.seconds, self._options.rate
        self._admin = await connect(port)
        for number in range(count):
            await self._put(f"a{number}", number)
        self._names = [f"a{number}" for number in range(count)]
        for _ in range(64):
            self._idle.put_nowait(await connect(port))
        weights = np.arange(1, count + 1) ** -1.1
        weights /= weights.sum()
        sends = np.cumsum(self._random.exponential(1 / rate, int(rate * seconds)))
        ranks = self._random.choice(count, len(sends), p=weights)
        lengths = self._random.integers(0, len(LENGTHS), len(sends))
        self._stop = asyncio.Event()
        changing = asyncio.create_task(self._change(count))
        start = time.perf_counter()
        tasks = []
        for at, rank, length in zip(sends, ranks, lengths, strict=True):
            wait = start + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self._ask(int(rank), int(length), start + at)))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - start
        self._stop.set()
        await changing
        latencies = np.array(self._latencies)
        return {
            "adapters": count,
            "max_resident": RESIDENT,
            "rate": rate,
            "seconds": took,
            "requests": len(sends),
            "answered": len(latencies),
            "errors": len(self.errors),
            "first_errors": self.errors[:3],
            "wrong": self.wrong,
            "changes": self.changes,
            "p50_ms": float(np.quantile(latencies, 0.5)),
            "p95_ms": float(np.quantile(latencies, 0.95)),
            "p99_ms": float(np.quantile(latencies, 0.99)),
            "max_ms": float(latencies.max()),
        }

    async def _ask(self, rank: int, length: int, intended: float) -> None:
        # ranks are places: who has one changes as adapters come and go
        name = self._names[rank]
        may = self._may[name]
        self._flying[name] = self._flying.get(name, 0) + 1
        allowed = set(may)
        connection = await self._idle.get()
        try:
            status, body = await connection.ask(request("pack", self._feeds[length], adapter=name))
            # what it became meanwhile is as right as what it was
            allowed |= self._may.get(name, set())
            if status != 200:
                self.errors.append(f"{status}: {body[:200]!r}")
                return
            self._latencies.append(1e3 * (time.perf_counter() - intended))
            logits = numbers(connection, body)
            if not any(np.allclose(logits, self._truths[one][length], rtol=0, atol=TOLERANCE) for one in allowed):
                self.wrong += 1
        except ConnectionError as error:
            self.errors.append(str(error))
        finally:
            self._flying[name] -= 1
            self._idle.put_nowait(connection)

    async def _change(self, count: int) -> None:
        """Without a pause: one is replaced, one removed, one added, and so on."""
        fresh = count
        while not self._stop.is_set():
            place = int(self._random.integers(0, count))
            name = self._names[place]
            self._may[name].add(fresh % len(self._files))
            await self._put(name, fresh % len(self._files))
            self.changes["replaced"] += 1
            fresh += 1
            place = int(self._random.integers(0, count))
            old, new = self._names[place], f"b{fresh}"
            await self._put(new, fresh % len(self._files))
            self._names[place] = new
            self.changes["added"] += 1
            fresh += 1
            while self._flying.get(old):
                await asyncio.sleep(0.001)
            await self._admin_asks("DELETE", old, b"")
            del self._may[old]
            self.changes["removed"] += 1

    async def _put(self, name: str, number: int) -> None:
        before = set(self._may.get(name, ()))
        self._may[name] = before | {number}
        await self._admin_asks("PUT", name, self._files[number])
        flying = self._flying.get(name, 0)
        if not flying:
            self._may[name] = {number}

    async def _admin_asks(self, method: str, name: str, body: bytes) -> None:
        head = f"{method} /v2/models/pack/adapters/{name} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {ADMIN}\r\n"
        status, answer = await self._admin.ask(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        if status != 200:
            self.errors.append(f"{method} {name}: {status} {answer[:200]!r}")
