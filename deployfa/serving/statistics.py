"""What a model has done, as Triton's statistics extension counts it.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

import threading
import time
from typing import Any

from deployfa.serving.work import Answered

__all__ = ["ModelStatistics"]

_SUMS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


class _Sum:
    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = self.ns = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.ns += int(1e9 * seconds)

    def shown(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class ModelStatistics:
    """Thread-safe.  A count is of requests; ``inference_count`` is of rows, ``execution_count`` of batches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = {name: _Sum() for name in _SUMS}
        self._batches: dict[int, tuple[_Sum, _Sum, _Sum]] = {}
        self._rows = self._executions = self._last = 0

    def answered(self, answer: Answered, rows: int, total_s: float, output_s: float) -> None:
        """One request; ``total_s`` from its arrival to its answer."""
        with self._lock:
            self._sums["success"].add(total_s)
            self._sums["queue"].add(answer.queue_s)
            self._sums["compute_input"].add(answer.input_s)
            self._sums["compute_infer"].add(answer.compute_s)
            self._sums["compute_output"].add(output_s)
            self._rows += rows
            self._last = time.time_ns() // 1_000_000

    def failed(self, total_s: float) -> None:
        with self._lock:
            self._sums["fail"].add(total_s)

    def ran(self, rows: int, input_s: float, compute_s: float, output_s: float) -> None:
        """One batch of ``rows``."""
        with self._lock:
            self._executions += 1
            sums = self._batches.setdefault(rows, (_Sum(), _Sum(), _Sum()))
            for each, seconds in zip(sums, (input_s, compute_s, output_s), strict=True):
                each.add(seconds)

    def shown(self, name: str, version: str) -> dict[str, Any]:
        """One element of the protocol's ``model_stats``."""
        with self._lock:
            none = {"count": 0, "ns": 0}
            sums = {name: each.shown() for name, each in self._sums.items()}
            sums |= {"cache_hit": none, "cache_miss": none}
            batches = [
                {
                    "batch_size": rows,
                    "compute_input": each[0].shown(),
                    "compute_infer": each[1].shown(),
                    "compute_output": each[2].shown(),
                }
                for rows, each in sorted(self._batches.items())
            ]
            return {
                "name": name,
                "version": version,
                "last_inference": self._last,
                "inference_count": self._rows,
                "execution_count": self._executions,
                "inference_stats": sums,
                "batch_stats": batches,
                "memory_usage": [],
            }
