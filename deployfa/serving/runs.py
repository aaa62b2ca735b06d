"""Run a batch and part its answers; a request that breaks its batch breaks it for itself alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deployfa.edits import Array
from deployfa.errors import DeployfaError, RequestError
from deployfa.serving.backends import Backend
from deployfa.serving.signature import Signature
from deployfa.serving.statistics import ModelStatistics
from deployfa.serving.work import Answered, Work

__all__ = ["Batch", "BatchRunner"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one inference was, for whoever counts: sizes, seconds, and the share of padding in [0, 1)."""

    rows: int
    requests: int
    adapters: int
    compute_s: float
    padding: float


class BatchRunner:
    """``probe``: feeds that the model is known to answer; ``observe``: called after each batch."""

    def __init__(
        self,
        backend: Backend,
        signature: Signature,
        statistics: ModelStatistics,
        probe: Mapping[str, Array],
        observe: Callable[[Batch], None],
    ) -> None:
        self._backend = backend
        self._signature = signature
        self._statistics = statistics
        self._probe = probe
        self._observe = observe
        #: why the model answers no more, None while it does
        self.broken: str | None = None

    def __call__(self, works: Sequence[Work], began: float) -> list[Answered | Exception]:
        """An answer or an exception for each, in order; ``began`` in ``time.monotonic`` seconds."""
        try:
            return list(self._run(works, began))
        except Exception as error:
            if len(works) > 1:
                # one of them is to blame, and only that one shall feel it
                found: list[Answered | Exception] = []
                for work in works:
                    found += self([work], time.monotonic())
                return found
            return [self._blame(works[0], error)]

    def _run(self, works: Sequence[Work], began: float) -> list[Answered]:
        signature = self._signature
        counts = [work.rows for work in works]
        length = max(work.length for work in works)
        feeds = signature.batched([work.feeds for work in works], counts, length)
        ready = time.monotonic()
        outputs = self._backend.run(feeds, works)
        done = time.monotonic()
        rows = sum(counts)
        padding = 1.0 - sum(work.tokens for work in works) / (rows * length)
        answers = []
        start = 0
        for work, count in zip(works, counts, strict=True):
            own = signature.parted(outputs, start, count, work.length)
            answers.append(Answered(own, began - work.arrived, done - ready, rows, padding, ready - began))
            start += count
        self.broken = None
        self._statistics.ran(rows, ready - began, done - ready, time.monotonic() - done)
        adapters = len({work.taken.name for work in works})
        self._observe(Batch(rows, len(works), adapters, done - ready, padding))
        return answers

    def _blame(self, work: Work, error: Exception) -> Exception:
        """Whose fault it is: the model's, if it does not answer what it is known to answer either."""
        try:
            alone = Work(self._probe, 1, 1, None, work.taken, None, 0.0, 0.0, lambda answer: None)
            self._backend.run(self._signature.batched([self._probe], [1], 1), [alone])
        except Exception as broken:
            self.broken = str(broken) or type(broken).__name__
            return RequestError(f"the model failed ({self.broken}); it is not ready any more", 500)
        told = str(error) if isinstance(error, DeployfaError) else f"{type(error).__name__}: {error}"
        return RequestError(f"the model does not answer this request: {told}")
