"""How far a build is.

A builder knows phases within phases, each with a number of steps; see ``IProgressMonitor`` in NVIDIA's Python API.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Phases", "Progress", "make_monitor"]

Progress = Callable[[float], None]


class Phases:
    """The share of the work that is done, in [0, 1]: a phase counts within its parent's current step."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str | None, int, int]] = {}
        self._highest = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._open[name] = parent, max(steps, 1), 0

    def step(self, name: str) -> None:
        if name in self._open:
            parent, steps, done = self._open[name]
            self._open[name] = parent, steps, min(done + 1, steps)

    def finish(self, name: str) -> None:
        self._open.pop(name, None)

    def share(self) -> float:
        """Never less than it was: a phase that ends gives way to its parent's next step a little later."""
        roots = [name for name, (parent, _, _) in self._open.items() if parent not in self._open]
        self._highest = max([self._highest, *(self._of(name) for name in roots)])
        return self._highest

    def _of(self, name: str) -> float:
        _, steps, done = self._open[name]
        inner = [self._of(child) for child, (parent, _, _) in self._open.items() if parent == name]
        return min(1.0, (done + max(inner, default=0.0)) / steps)


def make_monitor(api: Any, progress: Progress) -> Any:
    """A progress monitor for a builder of ``api`` that reports the share done."""

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name)
            progress(self.phases.share())
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()
