"""When requests are sent: drawn before the first one leaves, so that no answer can change it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["poisson_times"]


def poisson_times(rate: float, seconds: float, generator: np.random.Generator) -> npt.NDArray[Any]:
    """Ascending send times (n,) in [0, seconds), float64: a Poisson process, so gaps are exponential with mean 1/rate.

    That is what many independent clients add up to.  n is itself random, with mean ``rate * seconds``.
    """
    expected = rate * seconds
    some = int(expected + 6 * math.sqrt(expected)) + 16
    times = np.cumsum(generator.exponential(1 / rate, some))
    while times[-1] < seconds:
        times = np.concatenate([times, times[-1] + np.cumsum(generator.exponential(1 / rate, some))])
    return times[times < seconds]
