"""Every request at its time, whatever became of the others.

A client that waits for an answer before it sends the next request sends least while the server is slow, and so asks
least about it: one stall of a second becomes one slow request instead of the hundreds that real users would have made
("coordinated omission", Gil Tene, "How NOT to Measure Latency", 2013).  Here send times are drawn beforehand and
latency counts from them: a stall is seen by every request that fell into it, also when it was the generator's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deployfa.load.alarm import Alarm
from deployfa.load.client import Outcome

__all__ = ["Samples", "Send", "open_loop"]

Array = npt.NDArray[Any]
#: Sends the request with this number → (outcome, seconds that it waited in this process after the call).
Send = Callable[[int], Awaitable[tuple[int, float]]]
Progress = Callable[[float, float], None]

_SHOW_EVERY_S = 0.5
_LEAD_S = 0.02


@dataclass(frozen=True)
class Samples:
    """The measured requests, in the order of their intended send times; arrays of one length (n,).

    late_s: actual minus intended send time.  latency_s: from the intended send time to the last byte of the answer,
    NaN where there was none.  outcome: an ``Outcome`` or an HTTP status.  index: which request of the schedule.
    seconds: in which they were to be sent.  elapsed_s: the same, or until the last answer if that came later.
    cpu_share: of one core, used by this process while it was sending.
    """

    late_s: Array
    latency_s: Array
    outcome: Array
    index: Array
    seconds: float
    elapsed_s: float
    cpu_share: float
    interrupted: bool

    @property
    def ok(self) -> Array:
        """Which were answered, bool (n,)."""
        mask: Array = self.outcome == Outcome.OK
        return mask


async def open_loop(
    times: Array, send: Send, *, warmup: float, seconds: float, progress: Progress | None = None
) -> Samples:
    """Send request i at ``times[i]`` seconds, ascending, in [0, warmup + seconds); those before ``warmup`` count for
    nothing.  Returns when all are answered.

    Cancelling it (Ctrl-C) ends it early with what was measured: ``interrupted``, and what was in flight is
    ``Outcome.UNFINISHED``.
    """
    run = _Run(times, send)
    interrupted = False
    try:
        async with asyncio.TaskGroup() as group:
            await run.dispatch(group, warmup, warmup + seconds, progress)
    except asyncio.CancelledError:
        interrupted = True
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
    return run.samples(warmup, seconds, interrupted)


class _Run:
    def __init__(self, times: Array, send: Send) -> None:
        self._times = times
        self._send = send
        self._late = np.zeros(len(times))
        self._latency = np.full(len(times), np.nan)
        self._outcome = np.full(len(times), int(Outcome.UNFINISHED), dtype=np.int16)
        self._origin = time.perf_counter() + _LEAD_S
        self._dispatched = 0
        self._sent_until = 0.0
        self._cpu: tuple[float, float] | None = None
        self._cpu_share = 0.0

    async def dispatch(self, group: asyncio.TaskGroup, warm: float, end: float, progress: Progress | None) -> None:
        shown = 0.0
        with Alarm() as alarm:
            for number, due in enumerate(self._times.tolist()):
                left = self._origin + due - time.perf_counter()
                if left > 0:
                    await alarm.sleep(left)
                else:
                    # behind: what was started must run all the same
                    await asyncio.sleep(0)
                if due >= warm and self._cpu is None:
                    self._cpu = (time.process_time(), time.perf_counter())
                group.create_task(self._one(number, due))
                self._dispatched = number + 1
                if progress is not None and due - shown > _SHOW_EVERY_S:
                    shown = due
                    progress(due, end)
            left = self._origin + end - time.perf_counter()
            if left > 0:
                await alarm.sleep(left)
        self._note_cpu()
        if progress is not None:
            progress(end, end)

    async def _one(self, number: int, due: float) -> None:
        intended = self._origin + due
        started = time.perf_counter() - intended
        outcome, waited = await self._send(number)
        self._late[number] = started + waited
        self._outcome[number] = outcome
        if outcome > 0:
            self._latency[number] = time.perf_counter() - intended

    def _note_cpu(self) -> None:
        if self._cpu is not None:
            passed = time.perf_counter() - self._cpu[1]
            self._cpu_share = (time.process_time() - self._cpu[0]) / passed if passed > 0 else 0.0

    def samples(self, warmup: float, seconds: float, interrupted: bool) -> Samples:
        if interrupted and not self._cpu_share:
            self._note_cpu()
        now = time.perf_counter() - self._origin
        chosen = np.flatnonzero(self._times[: self._dispatched] >= warmup)
        window = max(0.0, min(seconds, now - warmup)) if interrupted else seconds
        answered = (self._times + self._latency)[chosen][self._outcome[chosen] == Outcome.OK]
        last = float(answered.max()) - warmup if answered.size else 0.0
        return Samples(
            late_s=self._late[chosen],
            latency_s=self._latency[chosen],
            outcome=self._outcome[chosen],
            index=chosen,
            seconds=window,
            elapsed_s=max(window, last),
            cpu_share=self._cpu_share,
            interrupted=interrupted,
        )
