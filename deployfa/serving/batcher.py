"""A thread that runs one model: it takes what fits together from the queue, batch after batch.

While the model computes, requests gather, so that batches grow with the load by themselves.  The event loop only puts
works in and is called back; it never waits for the model, and the model never waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from deployfa.errors import RequestError
from deployfa.serving.fair_queue import FairQueue, Policy
from deployfa.serving.work import Answered, Work

__all__ = ["Batcher", "Closed", "Run"]

#: Runs one batch: an answer or an exception for each work, in order.
Run = Callable[[Sequence[Work], float], Sequence[Answered | Exception]]


class Closed(RequestError):
    """The batcher takes no more; another one may have taken its place."""


class Batcher:
    """``submit`` from any thread; ``Work.done`` is called from the batcher's own.

    ``deliver``: called around all answers of a batch with a function that gives them out; a server passes one that
    moves to its event loop once a batch.
    """

    def __init__(
        self,
        run: Run,
        policy: Policy,
        *,
        name: str = "model",
        deliver: Callable[[Callable[[], None]], None] = lambda give_out: give_out(),
    ) -> None:
        self._run = run
        self._deliver = deliver
        self._queue = FairQueue(policy)
        self._changed = threading.Condition()
        self._closing = False
        self._computing = 0
        self._thread = threading.Thread(target=self._loop, name=f"deployfa-{name}", daemon=True)
        self._thread.start()

    @property
    def policy(self) -> Policy:
        return self._queue.policy

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, work: Work) -> None:
        """Raises ``RequestError``, 503, when the queue is full, and ``Closed`` when the batcher is."""
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise _closed()
            self._queue.push(work)
            if not self._computing:
                self._changed.notify()

    def cancel(self, work: Work) -> None:
        """Nobody wants the answer any more: it costs nothing if the model has not begun, ``done`` is not called."""
        with self._changed:
            waited = self._queue.cancel(work)
            work.cancelled = True
        if waited:
            work.taken.close()

    def wait_s(self) -> float:
        with self._changed:
            return self._queue.wait_s()

    def close(self, timeout: float | None = None) -> bool:
        """Take no more, answer what waits; False if that took longer than ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        try:
            self._serve()
        finally:
            # nobody waits for a thread that is no more, whatever ended it
            with self._changed:
                self._closing = True
                left = self._queue.drain()
            if left:
                self._give([(work, _closed()) for work in left])

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._computing = 0
                batch, late = self._next()
                self._computing = len(batch)
            if late:
                self._refuse(late)
            if batch:
                self._answer(batch)
            elif not late:
                return

    def _next(self) -> tuple[list[Work], list[Work]]:
        """Wait for a batch; nothing at all once the batcher is closed and the queue is empty.  Holds the lock."""
        policy = self._queue.policy
        while True:
            oldest = self._queue.oldest()
            now = time.monotonic()
            if oldest is None:
                if self._closing:
                    return [], []
                self._changed.wait()
                continue
            left = oldest + policy.max_delay_s - now
            if left > 0 and self._queue.rows < policy.max_rows and not self._closing:
                self._changed.wait(left)
                continue
            batch, late = self._queue.take(now)
            if batch or late:
                return batch, late

    def _answer(self, batch: list[Work]) -> None:
        began = time.monotonic()
        try:
            answers = self._run(batch, began)
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} requests")
        except Exception as error:
            # a batch that cannot even be tried is nobody's fault but ours
            answers = [error] * len(batch)
        except BaseException:
            self._give([(work, _closed()) for work in batch])
            raise
        took = time.monotonic() - began
        with self._changed:
            self._queue.learn(sum(work.tokens for work in batch), took)
        self._give(list(zip(batch, answers, strict=True)))

    def _refuse(self, late: list[Work]) -> None:
        error = RequestError("the request's deadline passed before its turn came; send fewer, or a longer timeout", 503)
        error.retry_after_s = self.wait_s()
        self._give([(work, error) for work in late])

    def _give(self, pairs: Sequence[tuple[Work, Answered | Exception]]) -> None:
        for work, _ in pairs:
            work.taken.close()

        def give_out() -> None:
            for work, answer in pairs:
                if not work.cancelled:
                    work.done(answer)

        self._deliver(give_out)


def _closed() -> Closed:
    return Closed("the model is being unloaded; try again", 503, retry_after_s=1.0)
