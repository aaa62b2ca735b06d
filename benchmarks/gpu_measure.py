"""Rounds of all contenders in random order, and what their samples say.  Nothing here knows of a GPU.

A sample is two times in milliseconds: on the GPU, and of the host from arrays to arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deployfa.bench.statistics import median_ratio, minimum_samples
from deployfa.edits import Array
from deployfa.errors import DeployfaError

__all__ = ["COUNT", "ROUNDS", "Rounds", "alternate", "first_line", "summary"]

Way = Callable[[], tuple[float, float]]
#: Samples of a contender in one round, and the fewest rounds that there must be.
COUNT = 5
ROUNDS = 3
_CLOCKS = ("gpu", "wall")
#: Rounds are taken in as many blocks, as if of as many launches: what drifts then widens the interval.
_BLOCKS = 5


@dataclass
class Rounds:
    """samples: contender → (rounds, COUNT, 2) milliseconds.  failed: contender → why it has none."""

    samples: dict[str, Array] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def alternate(ways: Mapping[str, Way], *, samples: int, seconds: float, warm_s: float, seed: int = 0) -> Rounds:
    """Warm every way for ``warm_s`` seconds, then run rounds until each has ``samples`` or ``seconds`` are over.

    A way that raises leaves, and none of its samples is kept.
    """
    failed: dict[str, str] = {}
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in ways}

    def attempt(name: str, work: Callable[[Way], Any]) -> None:
        try:
            work(ways[name])
        except Exception as error:  # out of memory, a kernel that fails: each library has its own
            failed[name] = first_line(error)
            taken.pop(name)

    for name in ways:
        attempt(name, lambda way: _warm(way, warm_s))
    random = np.random.default_rng(seed)
    end = time.perf_counter() + seconds
    wanted = max(ROUNDS, -(-samples // COUNT))
    for number in range(wanted):
        if number >= ROUNDS and time.perf_counter() > end:
            break
        for name in random.permutation(list(taken)):
            attempt(name, lambda way, name=name: taken[name].append([way() for _ in range(COUNT)]))
    return Rounds({name: np.array(rounds) for name, rounds in taken.items()}, failed)


def summary(
    samples: Mapping[str, Array], reference: Mapping[str, tuple[str | None, str | None]]
) -> list[dict[str, Any]]:
    """A row for each contender: medians by both clocks, and ratios with their 95 % intervals.

    reference: contender → the one whose time its ``over_pytorch`` ratios are of, and that of its ``over_folded``
    ratios; ``None``, or one without samples, for no ratio.  A figure that the samples do not carry is ``None``.
    """
    found = []
    for name, mine in samples.items():
        row: dict[str, Any] = {"contender": name, "samples": int(mine[..., 0].size)}
        for which, clock in enumerate(_CLOCKS):
            row[f"{clock}_p50_ms"] = float(np.median(mine[..., which]))
            row[f"{clock}_p95_ms"] = _p95(mine[..., which])
            for label, other in zip(("over_pytorch", "over_folded"), reference[name], strict=True):
                row |= _ratio(f"{clock}_{label}", mine[..., which], _of(samples, other, which))
        found.append(row)
    return found


def first_line(error: BaseException) -> str:
    """What a contender failed with: deployfa's own words, or the first line of a library's."""
    if isinstance(error, DeployfaError):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].strip()}" if text else type(error).__name__


def _warm(way: Way, seconds: float) -> None:
    end = time.perf_counter() + seconds
    for number in range(1_000_000):
        if number >= ROUNDS and time.perf_counter() > end:
            return
        way()


def _of(samples: Mapping[str, Array], name: str | None, which: int) -> Array | None:
    return None if name is None or name not in samples else samples[name][..., which]


def _ratio(label: str, mine: Array, other: Array | None) -> dict[str, float | None]:
    keys = (label, f"{label}_low", f"{label}_high")
    if other is None or other is mine or min(mine.size, other.size) < minimum_samples(0.5):
        return dict.fromkeys(keys)
    parts = _BLOCKS if len(mine) >= _BLOCKS * ROUNDS else 1
    interval = median_ratio(np.array_split(mine, parts), np.array_split(other, parts), seed=0)
    return dict(zip(keys, (interval.estimate, interval.low, interval.high), strict=True))


def _p95(values: Array) -> float | None:
    return float(np.quantile(values, 0.95)) if values.size >= minimum_samples(0.95) else None
