"""Waking up on time inside an event loop.

Event loops wait in whole milliseconds (epoll's unit; both asyncio's and uvloop's), which would make every request up to
one late and would be most of what a fast server shows.  Linux has a clock that is a file descriptor and as exact as the
kernel's timers; a loop waits for it as for a socket.  Elsewhere the loop's own sleep has to do.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from types import TracebackType

__all__ = ["Alarm"]

_CLOCK_MONOTONIC = 1


class Alarm:
    """A context manager inside a running loop; one ``sleep`` at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung: asyncio.Future[None] | None = None
        self._descriptor = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._descriptor = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> Alarm:
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._ring)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    async def sleep(self, seconds: float) -> None:
        """Wait; ``seconds`` above 0."""
        if self._descriptor < 0:
            await asyncio.sleep(seconds)
            return
        self._rung = self._loop.create_future()
        nanoseconds = max(1, round(seconds * 1e9))
        # struct itimerspec: no interval, then the delay, each as seconds and nanoseconds
        setting = (ctypes.c_long * 4)(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
        self._libc.timerfd_settime(self._descriptor, 0, setting, None)
        await self._rung

    def _ring(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            return  # set again between ringing and reading
        if self._rung is not None and not self._rung.done():
            self._rung.set_result(None)
