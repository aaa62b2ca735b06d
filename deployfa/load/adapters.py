"""Which adapter each request names: the popularity of adapters, and draws from it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deployfa.errors import InputError

__all__ = ["AdapterSpec"]

_BASE = "base"
_HOW = "write zipf:1.1:1000 (exponent, adapters), uniform:16, or names such as a,b,c"
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class AdapterSpec:
    """``count`` adapters, of which the k-th most popular (k from 1) is drawn with a probability that goes with
    ``k ** -exponent``: a bounded Zipf distribution, uniform with exponent 0.  ``names``: given by the caller, else the
    server's.
    """

    text: str
    count: int
    exponent: float = 0.0
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> AdapterSpec:
        """``zipf:S:N``, ``uniform:N`` or ``a,b,c``; raises ``InputError`` for anything else."""
        kind, colon, rest = text.partition(":")
        if colon and kind in ("zipf", "uniform"):
            parts = rest.split(":")
            if len(parts) != (2 if kind == "zipf" else 1):
                raise InputError(f"'{text}' names no number of adapters; {_HOW}")
            try:
                exponent, count = float(parts[0]) if kind == "zipf" else 0.0, int(parts[-1])
            except ValueError:
                raise InputError(f"'{text}' has something else where a number belongs; {_HOW}") from None
            if count < 1 or not (math.isfinite(exponent) and exponent >= 0):
                raise InputError(f"'{text}' needs an exponent of at least 0 and at least one adapter; {_HOW}")
            return cls(text, count, exponent)
        names = tuple(name.strip() for name in text.split(","))
        if not all(names):
            raise InputError(f"'{text}' has an adapter without a name; {_HOW}")
        if len(set(names)) < len(names):
            raise InputError(f"'{text}' names an adapter twice; name each once, {_HOW}")
        return cls(text, len(names), names=names)

    def probabilities(self) -> Array:
        """(count,) float64, most popular first, summing to 1."""
        weights = np.arange(1, self.count + 1, dtype=np.float64) ** -self.exponent
        normed: Array = weights / weights.sum()
        return normed

    def draw(self, count: int, generator: np.random.Generator) -> Array:
        """``count`` ranks from 0, int64: the inverse of the cumulative distribution at uniform numbers in [0, 1)."""
        cumulative = np.cumsum(self.probabilities())
        # the sum may end a rounding error below 1, and a draw above it would be nobody's
        cumulative[-1] = 1.0
        return np.searchsorted(cumulative, generator.random(count), side="right")

    def resolve(self, served: Sequence[str] | None, where: str) -> list[str]:
        """The names, most popular first.  served: what the server lists, ``None`` where it lists nothing: then names
        from the caller stay unchecked, and others are ``adapter-0``, ``adapter-1``, …; ``base`` is no adapter.

        Raises ``InputError`` for a name that the server lacks, and where it has fewer than ``count``.
        """
        if served is None:
            return list(self.names) or [f"adapter-{index}" for index in range(self.count)]
        for name in self.names:
            if name != _BASE and name not in served:
                shown = ", ".join(difflib.get_close_matches(name, served, n=4, cutoff=0.0)) or "none"
                raise InputError(f"no adapter '{name}' at {where}; it has {len(served)}, among them: {shown}")
        if self.names:
            return list(self.names)
        others = [name for name in served if name != _BASE]
        if len(others) < self.count:
            fewer = self.text[: self.text.rindex(":") + 1] + str(len(others))
            fix = f"pass --adapters {fewer}, or add adapters" if others else "add adapters to it"
            raise InputError(f"{where} has {len(others)} adapters and '{self.text}' asks for {self.count}; {fix}")
        return others[: self.count]
