"""Structured logs: one JSON object a line on standard error, written by a thread of its own.

A request is told by two appends to a list; a pipe that nobody reads holds up the thread, never the event loop, and what
does not fit any more is counted and said.
"""

from __future__ import annotations

import logging
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
        return _ENCODER.encode(line).decode()


class LineHandler(logging.Handler):
    """Lines go into memory, and from there to ``stream`` ten times a second; ``most`` lines wait at most."""

    def __init__(self, stream: TextIO, *, most: int = 10_000, every_s: float = 0.1) -> None:
        super().__init__()
        self._stream = stream
        self._lines: deque[logging.LogRecord] = deque()
        self._most = most
        self._every_s = every_s
        self.lost = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="deployfa-logs", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) >= self._most:
            self.lost += 1
            return
        self._lines.append(record)

    def close(self) -> None:
        """Write what waits."""
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
            pieces.append(self.format(self._lines.popleft()) + "\n")
        if self.lost:
            told, self.lost = self.lost, 0
            pieces.append(
                _ENCODER.encode({"time": _now(), "level": "warning", "event": f"{told} lines lost"}).decode() + "\n"
            )
        if pieces:
            try:
                self._stream.write("".join(pieces))
                self._stream.flush()
            except (OSError, ValueError):
                pass  # nobody reads any more: that is no reason to stop answering


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


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
