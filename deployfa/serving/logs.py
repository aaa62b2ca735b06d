"""Structured logs: one JSON object a line on standard error, written by a thread of its own.

A request is told by two appends to a list; a pipe that nobody reads holds up the thread, never the event loop, and what
does not fit any more is counted and said.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

__all__ = ["LOGGER", "JsonFormatter", "LineHandler", "start_logging", "stop_logging"]

#: What the lines are logged as.
LOGGER = "deployfa.serving"
_ENCODER = msgspec.json.Encoder(enc_hook=str)


class JsonFormatter(logging.Formatter):
    """``time`` (UTC), ``level``, ``event``, and the fields that came as ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return _ENCODER.encode(line).decode()
        except UnicodeEncodeError:
            # a file name that is no UTF-8; the json module writes what is not text as an escape
            return json.dumps(line, default=str)


class LineHandler(logging.Handler):
    """Lines go into memory, and from there to ``stream`` ten times a second; ``most`` lines wait at most."""

    def __init__(self, stream: TextIO, *, most: int = 10_000, every_s: float = 0.1) -> None:
        super().__init__()
        self._stream = stream
        self._lines: deque[logging.LogRecord] = deque()
        self._most = most
        self._every_s = every_s
        self.lost = 0
        self._file = _descriptor(stream)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="deployfa-logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) >= self._most:
            self.lost += 1
            return
        self._lines.append(record)

    def close(self) -> None:
        """Write what waits, if somebody reads it within 2 s."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(timeout=2.0)
        super().close()

    def _write_on(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(self._every_s)
            self._write()

    def _write(self) -> None:
        pieces = []
        while self._lines:
            pieces.append(self._line(self._lines.popleft()) + "\n")
        if self.lost:
            told, self.lost = self.lost, 0
            pieces.append(_said("warning", f"{told} lines lost") + "\n")
        if pieces:
            # that nobody reads any more is no reason to stop answering
            with contextlib.suppress(OSError, ValueError):
                self._put("".join(pieces))

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:
            # one line that cannot be written must not end all later ones
            return _said("error", f"the line {record.msg!r} cannot be written ({type(error).__name__})")

    def _put(self, text: str) -> None:
        if self._file is None:
            self._stream.write(text)
            self._stream.flush()
            return
        # past the stream's buffer, whose lock the interpreter takes at its end: this thread may wait here for ever
        content = memoryview(text.encode())
        while content:
            content = content[os.write(self._file, content) :]


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, AttributeError):
        return None  # in memory


def _said(level: str, event: str) -> str:
    stamp = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
    return _ENCODER.encode({"time": stamp, "level": level, "event": event}).decode()


def start_logging(level: str, stream: TextIO | None = None) -> logging.Logger:
    """The server's logger, and uvicorn's, to ``stream``; ``level``: of ``logging``, in small letters."""
    handler = LineHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger(LOGGER)
    for each in (logger, logging.getLogger("uvicorn"), logging.getLogger("uvicorn.error")):
        each.handlers = [handler] if each.name != "uvicorn.error" else []
        each.setLevel(level.upper())
        each.propagate = each.name == "uvicorn.error"
    return logger


def stop_logging() -> None:
    """Write what waits."""
    for handler in list(logging.getLogger(LOGGER).handlers):
        handler.close()
