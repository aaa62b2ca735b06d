"""The highest rate at which an objective is met, by doubling, halving and bisecting."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from deployfa.load.report import Step

__all__ = ["Found", "search"]

_PRECISION = 1.05
_LEAST_STEPS = 8
_MOST_STEPS = 40


@dataclass(frozen=True)
class Found:
    """rate: the highest that was within; limit: the step at the lowest rate above it that was not.  ``None``: none."""

    rate: float | None
    limit: Step | None


async def search(
    measure: Callable[[float], Awaitable[Step | None]], start: float, lowest: float
) -> tuple[Found, list[Step]]:
    """Try rates from ``start``, not below ``lowest``; measure returns ``None`` to end early.

    Doubled until one is not within, or halved until one is; then bisected until both are within 5 %.  One step may be
    luck, so the rate found is tried again until there were 8 steps; where that fails, the search goes on below it.
    """
    steps: list[Step] = []
    rate = start
    while len(steps) < _MOST_STEPS:
        step = await measure(rate)
        if step is None:
            break
        steps.append(step)
        found = bracket(steps)
        low, high = found.rate, found.limit.rate_per_s if found.limit is not None else None
        if low is None:
            if rate <= lowest:
                break
            rate = max(lowest, rate / 2)
        elif high is None:
            rate = low * 2
        elif high / low > _PRECISION:
            rate = math.sqrt(low * high)
        elif len(steps) < _LEAST_STEPS or sum(step.rate_per_s == low for step in steps) < 2:
            rate = low
        else:
            break
    return bracket(steps), steps


def bracket(steps: list[Step]) -> Found:
    """A rate that failed once has failed, and so has every higher one."""
    failed = [step for step in steps if step.verdict != "within"]
    limit = min(failed, key=lambda step: step.rate_per_s, default=None)
    below = math.inf if limit is None else limit.rate_per_s
    passed = [step.rate_per_s for step in steps if step.verdict == "within" and step.rate_per_s < below]
    return Found(max(passed, default=None), limit)
