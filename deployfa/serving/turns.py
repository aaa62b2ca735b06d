"""One at a time, by name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Turns"]


@dataclass(slots=True)
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    wanted: int = 0


class Turns:
    """``with turns.of(name):`` waits for whoever has the turn of that name; names that nobody wants cost nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, _Turn] = {}

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        with self._lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.wanted += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.wanted -= 1
                if not turn.wanted:
                    del self._turns[name]

    def __len__(self) -> int:
        """How many names somebody has the turn of, or waits for."""
        return len(self._turns)
