"""Ten thousand requests that nobody should send, and between them some that are right.

    python benchmarks/serve_fuzz.py --requests 10000 --out benchmarks/results

Each gets a 4xx with one line of JSON, or the right answer; never a 5xx.  The server's memory after the first requests
and at the end is compared, and whether it still answers right.  Exit status 1 if any of that is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deployfa.edits import Array

LENGTH = 12
TOLERANCE = 1e-4
#: Of the requests that must be answered within the server's own limit.
READ_S = 2.0


@dataclass(frozen=True)
class Sent:
    """``pieces``: bytes with a pause of ``pause_s`` between them; ``leaves``: hangs up instead of reading; ``right``:
    the logits that must come back, ``None`` for a request that must be refused."""

    kind: str
    pieces: tuple[bytes, ...]
    pause_s: float = 0.0
    leaves: bool = False
    right: Array | None = None


@dataclass
class Outcome:
    """What came back, by kind; ``violations``: what must not have."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def add(self, sent: Sent, status: int | None, body: bytes) -> None:
        self.statuses.setdefault(sent.kind, Counter())[str(status) if status is not None else "closed"] += 1
        wrong = judge(sent, status, body)
        if wrong is not None:
            self.violations.append(f"{sent.kind}: {wrong}")


def judge(sent: Sent, status: int | None, body: bytes) -> str | None:
    """Why an answer is not what it must be; ``None`` if it is.  ``status``: ``None`` for no answer."""
    if sent.leaves:
        return None
    if sent.right is not None:
        if status != 200:
            return f"a right request got {status}: {body[:200]!r}"
        outputs = {output["name"]: output for output in json.loads(body)["outputs"]}
        logits = np.array(outputs["logits"]["data"], np.float32)
        return None if np.allclose(logits, sent.right, rtol=0, atol=TOLERANCE) else f"wrong logits {logits}"
    if status is None:
        return "no answer"
    if not 400 <= status < 500:
        return f"{status}: {body[:200]!r}"
    try:
        return None if isinstance(json.loads(body)["error"], str) else f"no line of error: {body[:200]!r}"
    except (ValueError, KeyError, TypeError):
        return f"no JSON: {body[:200]!r}"


class Generator:
    """Requests from a seed.  ``truth``: the feeds of a right request → its logits."""

    def __init__(
        self, model: str, adapters: list[str], vocabulary: int, truth: Callable[..., Array], seed: int
    ) -> None:
        self._model, self._adapters, self._vocabulary, self._truth = model, adapters, vocabulary, truth
        self._random = np.random.default_rng(seed)
        self._known: dict[tuple[int, str], Array] = {}
        self._kinds = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("kind_")]
        self._rare = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("rare_")]

    def next(self) -> Sent:
        draw = self._random.random()
        if draw < 0.1:
            return self.right()
        if draw < 0.115:
            made = self._rare[self._random.integers(len(self._rare))]
        else:
            made = self._kinds[self._random.integers(len(self._kinds))]
        sent: Sent = made()
        return sent

    def right(self) -> Sent:
        number = int(self._random.integers(32))
        adapter = str(self._random.choice(self._adapters))
        feeds = self._feeds(number)
        key = number, adapter
        if key not in self._known:
            self._known[key] = self._truth(feeds, adapter)
        body = json.dumps(self._json(feeds, adapter)).encode()
        return Sent("right", (self._post(body),), right=self._known[key])

    # what is wrong with the tensors

    def kind_shape(self) -> Sent:
        shape = self._pick(
            [-1, LENGTH],
            [2**63, 2**64],
            [2**32, 2**32],
            [1, 2**64 + 1],
            [0, LENGTH],
            [1],
            [],
            [1, LENGTH, 1],
            [2, LENGTH],
            [1, LENGTH - 1],
            [1] * 40,
            [1, 0],
            [LENGTH, 1],
        )
        return self._changed("shape", lambda r: r["inputs"][0].update(shape=shape))

    def kind_shape_is_no_list(self) -> Sent:
        shape = self._pick(None, "1,12", {"0": 1}, [1.5, 12], ["1", "12"], [True, 12], [[1, 12]], [None])
        return self._changed("shape no list", lambda r: r["inputs"][0].update(shape=shape))

    def kind_datatype(self) -> Sent:
        datatype = self._pick("INT32", "FP32", "BOOL", "int64", "", "X" * 1000, 7, None, "BYTES", "FP16", "BF16")
        return self._changed("datatype", lambda r: r["inputs"][0].update(datatype=datatype))

    def kind_inputs(self) -> Sent:
        def change(r: Any) -> None:
            inputs = r["inputs"]
            how = self._random.integers(5)
            if how == 0:
                inputs.pop()
            elif how == 1:
                inputs.append(dict(inputs[0]))
            elif how == 2:
                inputs.append({**inputs[0], "name": "extra"})
            elif how == 3:
                inputs.clear()
            else:
                r["inputs"] = self._pick(None, {}, "x", [1], [[]], inputs * 40)

        return self._changed("missing, duplicate, extra inputs", change)

    def kind_token_ids(self) -> Sent:
        wrong = self._pick(-1, self._vocabulary, self._vocabulary + 1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63))
        return self._data("token ids out of range", lambda data: data.__setitem__(3, wrong))

    def kind_data(self) -> Sent:
        wrong = self._pick(2**63, 2**64, 10**400, 1.5, "1", None, [1], {}, True, 1e308)
        return self._data("elements", lambda data: data.__setitem__(0, wrong))

    def kind_data_length(self) -> Sent:
        return self._data(
            "too few, too many elements", lambda d: d.append(1) if self._random.random() < 0.5 else d.pop()
        )

    def kind_not_finite(self) -> Sent:
        word = self._pick(b"NaN", b"Infinity", b"-Infinity", b"1e999")
        body = json.dumps(self._json(self._feeds(0), self._adapters[0])).encode()
        return Sent(
            "NaN and infinity",
            (
                self._post(
                    body.replace(b"[[", b"[" + word + b",[", 1).replace(b'"data": [', b'"data": [' + word + b",", 1)
                ),
            ),
        )

    def kind_mask(self) -> Sent:
        return self._changed("a row that is all masked", lambda r: r["inputs"][1].update(data=[0] * LENGTH))

    def kind_parameters(self) -> Sent:
        name, value = self._pick(
            ("strength", 2),
            ("strength", -0.1),
            ("strength", "half"),
            ("strength", True),
            ("adapter", "nobody"),
            ("adapter", 7),
            ("adapter", "x" * 5000),
            ("adapter", "\x00"),
            ("timeout", -1),
            ("timeout", "soon"),
            ("timeout", 1.5),
            ("x", [1]),
            ("x", {"y": 1}),
            ("adapter", "../../etc/passwd"),
        )
        return self._changed("parameters", lambda r: r["parameters"].update({name: value}))

    def kind_outputs(self) -> Sent:
        outputs = self._pick(
            [{"name": "nothing"}],
            [{}],
            [{"name": 7}],
            "logits",
            [{"name": "logits"}] * 2,
            [{"name": "logits", "parameters": {"classification": -1}}],
            [{"name": "label", "parameters": {"classification": 2}}],
            [{"name": "logits", "parameters": {"shared_memory_region": "x"}}],
            [{"name": "l" * 100_000}],
        )
        return self._changed("outputs", lambda r: r.update(outputs=outputs))

    # what is wrong with the binary part

    def kind_header_length(self) -> Sent:
        head, tail = self._binary()
        value = self._pick(
            "-1",
            "x",
            "",
            "1e3",
            str(10**30),
            str(len(head) + len(tail) + 1),
            "0",
            str(len(head) - 1),
            str(len(head) + 1),
            "+1",
            "1_0",
            "٣",
            str(len(head)) + " x",
        )
        return Sent("header length", (self._post(head + tail, length=value),))

    def kind_two_header_lengths(self) -> Sent:
        head, tail = self._binary()
        more = f"inference-header-content-length: {len(head) - 1}\r\n".encode()
        return Sent("header length twice", (self._post(head + tail, length=str(len(head)), more=more),))

    def kind_binary_size(self) -> Sent:
        size = self._pick(-8, 0, 1, 8 * LENGTH - 1, 8 * LENGTH + 8, 2**63, 2**64, "96", 96.0, True)
        head, tail = self._binary(lambda r: r["inputs"][0]["parameters"].update(binary_data_size=size))
        return Sent("binary size", (self._post(head + tail, length=str(len(head))),))

    def kind_trailing_bytes(self) -> Sent:
        head, tail = self._binary()
        return Sent("trailing bytes", (self._post(head + tail + b"x" * self._pick(1, 8, 5000), length=str(len(head))),))

    def kind_missing_bytes(self) -> Sent:
        head, tail = self._binary()
        return Sent("missing bytes", (self._post(head + tail[: -self._pick(1, 8, 90)], length=str(len(head))),))

    def kind_binary_and_data(self) -> Sent:
        head, tail = self._binary(lambda r: r["inputs"][0].update(data=[1] * LENGTH))
        return Sent("binary and data", (self._post(head + tail, length=str(len(head))),))

    def kind_text(self) -> Sent:
        tensor = self._pick(
            {"shape": [1], "data": [7]},
            {"shape": [2], "data": ["a"]},
            {"shape": [0], "data": []},
            {"shape": [1, 1, 1], "data": ["a"]},
            {"shape": [1], "data": ["x" * 300_000]},
            {"shape": [1], "data": ["\ud800"]},
            {"shape": [1000], "data": ["a"] * 1000},
            {"shape": [1]},
        )
        request = {
            "inputs": [{"name": "text", "datatype": "BYTES", **tensor}],
            "parameters": {"adapter": self._adapters[0]},
        }
        return Sent("text", (self._post(json.dumps(request).encode()),))

    def kind_bytes_tensor(self) -> Sent:
        content = self._pick(b"", b"\x05", b"\x05\0\0\0ab", b"\xff\xff\xff\xff", b"\x01\0\0\0ab", b"\x02\0\0\0\xff\xfe")
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(content)}}
        head = json.dumps({"inputs": [tensor], "parameters": {"adapter": self._adapters[0]}}).encode()
        return Sent("bytes with wrong lengths", (self._post(head + content, length=str(len(head))),))

    # what is wrong with the JSON and its compression

    def kind_json(self) -> Sent:
        body = self._pick(
            b"",
            b"{",
            b"[]",
            b"null",
            b"7",
            b'"x"',
            b"{}",
            b"\xff\xfe",
            b'{"inputs": [}',
            b"\0" * 100,
            b'{"inputs": []}',
            b'{"inputs": 1, "inputs": 2}',
            b"{" * 1000,
            b'{"a": 1}' * 2,
        )
        return Sent("JSON", (self._post(body),))

    def kind_deep(self) -> Sent:
        deep = self._pick(b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000)
        body = self._pick(
            deep,
            b'{"x": ' + deep + b', "inputs": []}',
            b'{"inputs": [], "parameters": {"x": ' + deep + b"}}",
            b'{"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1], "data": ' + deep + b"}]}",
        )
        return Sent("JSON 100,000 deep", (self._post(body),))

    def kind_compressed(self) -> Sent:
        body = json.dumps(self._json(self._feeds(0), self._adapters[0])).encode()
        packed = gzip.compress(body)
        content, encoding = self._pick(
            (packed[:-9], "gzip"),
            (packed + b"x", "gzip"),
            (body, "gzip"),
            (body, "deflate"),
            (packed, "br"),
            (zlib.compress(body)[:-3], "deflate"),
            (b"", "gzip"),
            (packed, "gzip, gzip"),
            (packed[:20], "gzip"),
        )
        return Sent("compression", (self._post(content, more=f"content-encoding: {encoding}\r\n".encode()),))

    def rare_bomb(self) -> Sent:
        """1 GB of zeros in 1 MB."""
        return Sent("gzip bomb", (self._post(_bomb(), more=b"content-encoding: gzip\r\n"),))

    def rare_large(self) -> Sent:
        """100 MB, said beforehand or in chunks; the server may hang up on who goes on."""
        block = b"x" * 2**20
        if self._random.random() < 0.5:
            head = self._head(100 * 2**20)
            return Sent("100 MB body", (head, *[block] * 100))
        chunk = b"%x\r\n" % len(block) + block + b"\r\n"
        head = self._head(None, more=b"transfer-encoding: chunked\r\n")
        return Sent("100 MB body in chunks", (head, *[chunk] * 100, b"0\r\n\r\n"))

    # what is wrong with HTTP, and with who speaks it

    def kind_path(self) -> Sent:
        path = self._pick(
            "/",
            "/v2/models/nobody/infer",
            "/v2/models/%2e%2e/infer",
            "/v3",
            "/v2/models//infer",
            "/" + "x" * 9000,
            f"/v2/models/{self._model}/versions/7/infer",
            f"/v2/models/{self._model}/infer/",
            "/v2/repository",
        )
        return Sent("unknown path", (f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode(),))

    def kind_method(self) -> Sent:
        method = self._pick("GET", "PUT", "DELETE", "PATCH", "OPTIONS")
        path = f"/v2/models/{self._model}/infer"
        return Sent("method", (f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode(),))

    def kind_not_allowed(self) -> Sent:
        method, path = self._pick(
            ("POST", f"/v2/repository/models/{self._model}/unload"),
            ("POST", f"/v2/repository/models/{self._model}/load"),
            ("PUT", f"/v2/models/{self._model}/adapters/x"),
            ("DELETE", f"/v2/models/{self._model}/adapters/x"),
            ("POST", "/v2/systemsharedmemory/region/x/register"),
        )
        return Sent("not allowed", (f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{{}}".encode(),))

    def kind_http(self) -> Sent:
        raw = self._pick(
            b"\0" * 50 + b"\r\n\r\n",
            b"HELLO\r\n\r\n",
            b"POST\r\n\r\n",
            b"POST / HTTP/9.9\r\n\r\n",
            b"\x16\x03\x01\x02\0\x01\r\n\r\n",
            b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
            b"POST / HTTP/1.1\r\n: x\r\n\r\n",
            b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            b"GET /%ff%fe HTTP/1.1\r\nhost: x\r\n\r\n",
        )
        return Sent("HTTP", (raw,))

    def kind_headers(self) -> Sent:
        more = self._pick(b"x: " + b"y" * 40_000 + b"\r\n", b"".join(b"x-%d: y\r\n" % n for n in range(5000)))
        return Sent("long headers", (self._post(b"{}", more=more),))

    def kind_leaves(self) -> Sent:
        raw = self._post(json.dumps(self._json(self._feeds(1), self._adapters[0])).encode())
        cut = len(raw) if self._random.random() < 0.5 else int(self._random.integers(1, len(raw)))
        return Sent("hangs up", (raw[:cut],), leaves=True)

    def rare_half(self) -> Sent:
        raw = self._post(json.dumps(self._json(self._feeds(1), self._adapters[0])).encode())
        return Sent("half a request and silence", (raw[: int(self._random.integers(1, len(raw) - 1))],))

    def rare_slow(self) -> Sent:
        raw = self._post(json.dumps(self._json(self._feeds(1), self._adapters[0])).encode())
        return Sent("byte by byte", tuple(raw[n : n + 1] for n in range(len(raw))), pause_s=READ_S / 50)

    # how they are made

    def _pick(self, *values: Any) -> Any:
        return values[self._random.integers(len(values))]

    def _feeds(self, number: int) -> dict[str, Array]:
        ids = np.random.default_rng(number).integers(1000, 20_000, (1, LENGTH))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    def _json(self, feeds: Mapping[str, Array], adapter: str) -> dict[str, Any]:
        inputs = [
            {"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.reshape(-1).tolist()}
            for name, array in feeds.items()
        ]
        return {"inputs": inputs, "parameters": {"adapter": adapter}}

    def _changed(self, kind: str, change: Callable[[Any], None]) -> Sent:
        request = self._json(self._feeds(0), self._adapters[0])
        change(request)
        return Sent(kind, (self._post(json.dumps(request).encode()),))

    def _data(self, kind: str, change: Callable[[list[Any]], Any]) -> Sent:
        return self._changed(kind, lambda request: change(request["inputs"][0]["data"]))

    def _binary(self, change: Callable[[Any], None] = lambda request: None) -> tuple[bytes, bytes]:
        feeds = self._feeds(0)
        request = self._json(feeds, self._adapters[0])
        for tensor in request["inputs"]:
            del tensor["data"]
            tensor["parameters"] = {"binary_data_size": 8 * LENGTH}
        change(request)
        return json.dumps(request).encode(), b"".join(array.tobytes() for array in feeds.values())

    def _post(self, body: bytes, *, length: str | None = None, more: bytes = b"") -> bytes:
        if length is not None:
            more += f"inference-header-content-length: {length}\r\n".encode()
        return self._head(len(body), more) + body

    def _head(self, length: int | None, more: bytes = b"") -> bytes:
        if length is not None:
            more += b"content-length: %d\r\n" % length
        return f"POST /v2/models/{self._model}/infer HTTP/1.1\r\nhost: x\r\n".encode() + more + b"\r\n"


_BOMB: list[bytes] = []


def _bomb() -> bytes:
    if not _BOMB:
        stream = zlib.compressobj(9, zlib.DEFLATED, 31)
        block = b"\0" * 2**20
        _BOMB.append(b"".join(stream.compress(block) for _ in range(1024)) + stream.flush())
    return _BOMB[0]


async def send(port: int, sent: Sent, timeout: float = 30.0) -> tuple[int | None, bytes]:
    """Status and body; ``None`` if the connection ended without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def write() -> None:
        try:
            for piece in sent.pieces:
                writer.write(piece)
                await writer.drain()
                if sent.pause_s:
                    await asyncio.sleep(sent.pause_s)
        except ConnectionError:
            pass  # it has heard enough

    writing = asyncio.create_task(write())
    try:
        if sent.leaves:
            await writing
            return None, b""
        async with asyncio.timeout(timeout):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            length = next(int(line[16:]) for line in lines if line.startswith(b"content-length: "))
            return int(head[9:12]), await reader.readexactly(length)
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
        return None, b""
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        writer.transport.abort()


async def fuzz(port: int, generator: Generator, requests: int, outcome: Outcome, *, workers: int = 16) -> None:
    """Some are slow on purpose, so that many are on their way at once."""
    left = iter(range(requests))

    async def work() -> None:
        for _ in left:
            sent = generator.next()
            outcome.add(sent, *await send(port, sent))

    await asyncio.gather(*(work() for _ in range(workers)))
    sent = generator.right()
    outcome.add(sent, *await send(port, sent))


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Requests that nobody should send", ""]
    before, after = report["memory_mb"]
    lines += [
        f"{report['requests']:,} requests, seed {report['seed']}, {report['seconds']:.0f} s: "
        f"**{len(report['violations'])} violations**.  Memory of the server after the first "
        f"{report['settled_after']:,}: {before:.1f} MB, at the end {after:.1f} MB ({report['growth']:+.1%}).",
        "",
    ]
    lines += ["| kind | requests | answers |", "| --- | --- | --- |"]
    for kind, statuses in sorted(report["statuses"].items()):
        told = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        lines.append(f"| {kind} | {sum(statuses.values())} | {told} |")
    return "\n".join([*lines, ""])


def main() -> int:
    from many_adapters import adapter, cores, fed
    from serving_client import Server

    from deployfa.mixed import MixedRunner
    from deployfa.pack import pack

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="The folder of serve_fuzz.json and serve_fuzz.md.")
    options = parser.parse_args()
    settle = options.requests // 5
    with tempfile.TemporaryDirectory(prefix="deployfa-fuzz-") as scratch:
        own = {f"vefa-{number}": adapter("vefa", number) for number in range(4)}
        packed = pack(own, Path(scratch) / "pack", table_inputs=True, optimize="ort").bundle
        runner = MixedRunner(packed, threads=cores(), spinning=False)

        def truth(feeds: dict[str, Array], name: str) -> Array:
            return runner.run(fed(feeds, runner), [name])["logits"][0]

        generator = Generator("pack", list(own), 30_522, truth, options.seed)
        outcome = Outcome()
        with Server({"pack": packed.path}, "--read-timeout", READ_S) as server:
            started = time.perf_counter()
            asyncio.run(fuzz(server.port, generator, settle, outcome))
            before = resident_mb(server.process.pid)
            asyncio.run(fuzz(server.port, generator, options.requests - settle, outcome))
            after = resident_mb(server.process.pid)
            seconds = time.perf_counter() - started
    growth = after / before - 1
    if abs(growth) > 0.05:
        outcome.violations.append(f"memory grew by {growth:+.1%}")
    report = {
        "requests": options.requests,
        "seed": options.seed,
        "seconds": seconds,
        "settled_after": settle,
        "memory_mb": [before, after],
        "growth": growth,
        "statuses": outcome.statuses,
        "violations": outcome.violations[:100],
    }
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "serve_fuzz.json").write_text(
            json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        (options.out / "serve_fuzz.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    print("\n".join(outcome.violations[:20]))
    return 1 if outcome.violations else 0


def resident_mb(pid: int) -> float:
    import psutil

    return psutil.Process(pid).memory_info().rss / 1e6


if __name__ == "__main__":
    sys.exit(main())
