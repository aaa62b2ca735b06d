"""Logs: one JSON object a line, and nobody who does not read them stops the answers."""

from __future__ import annotations

import http.client
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployfa.serving.logs import JsonFormatter, LineHandler

BODY = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["A joy."]}]}


def wait_for(found: Callable[[], Any]) -> Any:
    """What ``found`` returns once that is something: lines are written ten times a second."""
    until = time.monotonic() + 20
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return value


class TestAServersLines:
    def line(self, served, request_id: str, event: str = "request") -> dict[str, Any]:
        def found() -> Any:
            return [each for each in served.lines if (each.get("request_id"), each["event"]) == (request_id, event)]

        (line,) = wait_for(found)
        return line

    def test_an_answer_has_its_own(self, served) -> None:
        body = BODY | {"parameters": {"adapter": "vefa"}}
        status, _, told = served.ask("/v2/models/pack/infer", body, headers={"X-Request-Id": "mine-1"})
        assert status == 200 and told["x-request-id"] == "mine-1"
        line = self.line(served, "mine-1")
        assert line["level"] == "info" and line["time"].endswith("+00:00")
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v2/models/pack/infer", 200)
        assert (line["model"], line["adapter"], line["rows"], line["batch_rows"]) == ("pack", "vefa", 1, 1)
        assert line["client"] == "127.0.0.1"
        assert line["ms"] >= line["queue_ms"] + line["compute_ms"] > 0

    def test_a_refusal_says_why(self, served) -> None:
        status, answer, told = served.ask("/v2/models/pack/infer", BODY | {"parameters": {"adapter": "nobody"}})
        assert status == 404
        line = self.line(served, told["x-request-id"])
        assert line["status"] == 404 and line["error"] == answer["error"] and "nobody" in line["error"]
        assert "adapter" not in line

    def test_what_a_client_writes_stays_in_its_field(self, served) -> None:
        path = '/v2/models/a"%0A%7B%22event%22%3A%22ready%22%7D%ff/infer'
        status, _, told = served.ask(path, BODY)
        assert status == 404
        assert 'a"\n{"event":"ready"}' in self.line(served, told["x-request-id"])["path"]

    def test_no_token_and_no_text_is_in_them(self, served) -> None:
        headers = {"Authorization": f"Bearer {served.admin}", "X-Request-Id": "mine-2"}
        served.ask("/v2/models/folded/infer", BODY, headers=headers)
        self.line(served, "mine-2")
        whole = json.dumps(served.lines)
        assert served.admin not in whole and "A joy." not in whole

    def test_every_line_has_the_fields(self, served) -> None:
        events = [line["event"] for line in served.lines]
        assert events[0] == "listening" and events.count("model loaded") == 4
        for line in served.lines:
            assert {"time", "level", "event"} <= set(line)


class Unread:
    """A server whose standard error is a pipe; ``raw``: what has been read of it."""

    def __init__(self, bundle: Path) -> None:
        command = [sys.executable, "-m", "deployfa.cli", "serve", "--port", "0", "--drain-timeout", "1", str(bundle)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        self.raw: list[bytes] = []
        assert self.process.stderr is not None
        while b'"ready"' not in (line := self.process.stderr.readline()):
            assert line, b"".join(self.raw)
            self.raw.append(line)
        self.raw.append(line)
        host = json.loads(line)["url"].removeprefix("http://")
        self.connection = http.client.HTTPConnection(host, timeout=30)

    def ask(self, path: str, body: Any = None) -> int:
        self.connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
        answer = self.connection.getresponse()
        answer.read()
        return answer.status

    def ask_until_full(self) -> None:
        """A pipe holds 64 kB; a line has 200 bytes."""
        for _ in range(600):
            assert self.ask("/v2/health/live") == 200


@pytest.fixture
def unread(bundles: dict[str, Path]) -> Iterator[Unread]:
    server = Unread(bundles["folded"])
    yield server
    server.connection.close()
    server.process.kill()
    assert server.process.stderr is not None
    server.process.stderr.close()
    server.process.wait()


class TestNobodyReads:
    def test_answers_go_on_and_the_lines_come_when_someone_reads_again(self, unread: Unread) -> None:
        unread.ask_until_full()
        time.sleep(0.3)  # the writer is stuck now
        assert unread.ask("/v2/models/folded/infer", BODY) == 200
        stream = unread.process.stderr
        assert stream is not None

        def read() -> None:
            unread.raw.extend(stream)

        reader = threading.Thread(target=read)
        reader.start()
        unread.process.send_signal(signal.SIGTERM)
        assert unread.process.wait(30) == 0
        reader.join(30)
        # whole lines, every one of them
        lines = [json.loads(line) for line in b"".join(unread.raw).splitlines()]
        assert sum(line["event"] == "request" for line in lines) == 601
        assert lines[-1]["event"] == "stopped"

    def test_it_stops_as_ever(self, unread: Unread) -> None:
        """A thread that is stuck in a write must not make the interpreter's end an abort."""
        unread.ask_until_full()
        time.sleep(0.3)
        unread.process.send_signal(signal.SIGTERM)
        assert unread.process.wait(30) == 0

    def test_a_reader_that_is_gone_stops_nothing(self, unread: Unread) -> None:
        assert unread.process.stderr is not None
        unread.process.stderr.close()
        for _ in range(3):
            assert unread.ask("/v2/models/folded/infer", BODY) == 200
            time.sleep(0.15)
        unread.process.send_signal(signal.SIGTERM)
        assert unread.process.wait(30) == 0


class TestTheHandler:
    def logged(self, *fields: dict[str, Any]) -> list[dict[str, Any]]:
        stream = io.StringIO()
        handler = LineHandler(stream, every_s=0.01)
        handler.setFormatter(JsonFormatter())
        for each in fields:
            record = logging.makeLogRecord({"msg": "told", "levelname": "INFO", "fields": each})
            handler.emit(record)
        handler.close()
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    def test_what_no_text_can_hold_is_told_otherwise(self) -> None:
        """File names of other encodings come as lone surrogates, which UTF-8 has no bytes for."""
        odd = os.fsdecode(b"caf\xe9.bundle")
        first, second = self.logged({"path": odd}, {"path": Path("plain")})
        assert first["event"] == "told" and "caf" in first["path"] and ".bundle" in first["path"]
        assert second["path"] == "plain"

    def test_what_cannot_be_formatted_costs_one_line(self) -> None:
        class Sulky:
            def __str__(self) -> str:
                raise RuntimeError("no")

        lines = self.logged({"each": 1}, {"each": Sulky()}, {"each": 3})
        assert [line.get("each") for line in lines] == [1, None, 3]
        assert lines[1]["level"] == "error" and "told" in lines[1]["event"]

    def test_more_than_it_holds_is_counted(self) -> None:
        read, write = os.pipe()
        with open(read, "rb") as reader, open(write, "w", encoding="utf-8") as writer:
            handler = LineHandler(writer, most=5, every_s=3600)
            handler.setFormatter(JsonFormatter())
            for number in range(8):
                handler.emit(logging.makeLogRecord({"msg": str(number)}))
            handler.close()
            writer.close()
            lines = [json.loads(line) for line in reader.read().splitlines()]
        assert [line["event"] for line in lines] == ["0", "1", "2", "3", "4", "3 lines lost"]

    def test_a_traceback_is_one_line(self) -> None:
        stream = io.StringIO()
        handler = LineHandler(stream)
        handler.setFormatter(JsonFormatter())
        try:
            raise ValueError("two\nlines")
        except ValueError:
            handler.emit(logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info()))
        handler.close()
        (line,) = stream.getvalue().splitlines()
        assert "ValueError: two\nlines" in json.loads(line)["traceback"]
