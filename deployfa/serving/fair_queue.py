"""Which requests make the next batch: fair between adapters, grouped by length, never more than was said.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996) with an adapter as a flow and tokens as its cost: a request
gets the tag ``max(virtual time, end of its adapter's last one)``, and the lowest tag goes first.  An adapter with one
request waits for one request of each other adapter, however many of them a busy one has queued.

The first of the queue is always in the batch, so nobody starves.  Others join in order if they go together with it:
same group, rows and padded tokens within the budget, and no more padding than ``max_padding``.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from deployfa.errors import RequestError
from deployfa.serving.work import Work

__all__ = ["FairQueue", "Policy"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How requests become batches.

    ``max_rows``, ``max_tokens``: of one batch, tokens with their padding; ``max_padding``: the share of a batch's
    positions, in [0, 1), that may be padding; ``max_queue``: requests that may wait; ``max_delay_s``: how long an idle
    model waits for company, 0 for not at all (requests gather by themselves while the model is busy).
    """

    max_rows: int = 32
    max_tokens: int = 16_384
    max_padding: float = 0.25
    max_queue: int = 1024
    max_delay_s: float = 0.0


class FairQueue:
    """Not thread-safe: the batcher has the lock.  Time is ``time.monotonic`` seconds, and passed in."""

    #: How many requests are looked at for a batch, for each row that it may have.
    LOOK_AHEAD = 4

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._heap: list[Work] = []
        #: adapter → the tag at which its next request may start
        self._ends: dict[str, float] = {}
        self._virtual = 0.0
        self._order = 0
        self._waiting = 0
        self._rows = 0
        self._tokens = 0
        #: seconds that the model took for a token lately
        self._token_s = 0.0

    def __len__(self) -> int:
        """Requests that wait; those that were cancelled do not count."""
        return self._waiting

    @property
    def rows(self) -> int:
        return self._rows

    def push(self, work: Work) -> None:
        """Raises ``RequestError``: 503 with a time to come back when the queue is full."""
        if self._waiting >= self.policy.max_queue:
            raise RequestError(
                f"{self._waiting} requests are waiting already; try again later, or send to another server",
                503,
                retry_after_s=self.wait_s(),
            )
        name = work.taken.name
        work.tag = max(self._virtual, self._ends.get(name, 0.0))
        work.order = self._order
        self._order += 1
        self._ends[name] = work.tag + work.tokens
        self._count(work, 1)
        heapq.heappush(self._heap, work)

    def cancel(self, work: Work) -> bool:
        """Take ``work`` out; False if it is not in the queue any more."""
        if work.cancelled or work.order < 0:
            return False
        work.cancelled = True
        self._count(work, -1)
        if len(self._heap) > 64 and self._waiting < len(self._heap) // 2:
            self._heap = [each for each in self._heap if not each.cancelled]
            heapq.heapify(self._heap)
        return True

    def take(self, now: float) -> tuple[list[Work], list[Work]]:
        """The next batch, and what is too late for one: its deadline has passed."""
        late: list[Work] = []
        batch: list[Work] = []
        passed: list[Work] = []
        rows = tokens = length = 0
        policy = self.policy
        looks = self.LOOK_AHEAD * policy.max_rows
        while self._heap and looks > 0:
            work = heapq.heappop(self._heap)
            if work.cancelled:
                continue
            if work.deadline <= now:
                self._leave(work)
                late.append(work)
                continue
            looks -= 1
            longest = max(length, work.length)
            padded = (rows + work.rows) * longest
            if batch and (
                work.group != batch[0].group
                or rows + work.rows > policy.max_rows
                or padded > policy.max_tokens
                or padded - tokens - work.tokens > policy.max_padding * padded
            ):
                passed.append(work)
                continue
            self._leave(work)
            self._virtual = max(self._virtual, work.tag)
            batch.append(work)
            rows, tokens, length = rows + work.rows, tokens + work.tokens, longest
            if rows >= policy.max_rows or rows * length >= policy.max_tokens:
                break
        for work in passed:
            heapq.heappush(self._heap, work)
        if not self._waiting:
            # nobody waits, so nobody is ahead
            self._ends.clear()
            self._virtual = 0.0
        elif len(self._ends) > 1024 + 4 * self._waiting:
            # who ended before now starts now, known or not
            self._ends = {name: end for name, end in self._ends.items() if end > self._virtual}
        return batch, late

    def oldest(self) -> float | None:
        """When the request arrived that is next in turn."""
        while self._heap and self._heap[0].cancelled:
            heapq.heappop(self._heap)
        return self._heap[0].arrived if self._heap else None

    def learn(self, tokens: int, seconds: float) -> None:
        """What a batch took, for ``wait_s``: the average of about the last ten."""
        each = seconds / max(tokens, 1)
        self._token_s = each if self._token_s == 0.0 else 0.9 * self._token_s + 0.1 * each

    def wait_s(self) -> float:
        """About how long until what waits now is answered; at least a second, as Retry-After counts in them."""
        return float(max(1, math.ceil(self._tokens * self._token_s)))

    def drain(self) -> Sequence[Work]:
        """All that wait, which then wait no more."""
        left = [work for work in self._heap if not work.cancelled]
        for work in left:
            self._leave(work)
        self._heap.clear()
        return left

    def _leave(self, work: Work) -> None:
        self._count(work, -1)
        work.order = -1

    def _count(self, work: Work, sign: int) -> None:
        self._waiting += sign
        self._rows += sign * work.rows
        self._tokens += sign * work.tokens
