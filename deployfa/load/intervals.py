"""How sure a percentile of one run is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["design_effect", "quantile_interval"]

Array = npt.NDArray[Any]
_Z95 = 1.960
#: Blocks and Student's t, two-sided 95 %, for one degree of freedom less.
_BLOCKS, _T95 = 20, 2.093
_FEW, _FEW_BLOCKS, _FEW_T95 = 100, 10, 2.262


def quantile_interval(samples: Array, q: float) -> tuple[float | None, float | None]:
    """A 95 % confidence interval for quantile ``q`` of what ``samples`` (n,), in the order of time, are drawn from.

    The interval of order statistics that the binomial distribution gives (how many of n lie below the true quantile).
    It assumes nothing about the shape of latencies, but that they are independent, and those of one run are not: a
    queue passes from one request to the next.  So n is divided by ``design_effect`` first.  ``None``: the end that the
    samples do not reach.  It says how sure the figure is for this run of this server; another day is not in it.
    """
    values = np.asarray(samples, dtype=np.float64)
    count = len(values)
    ordered = np.sort(values)
    effective = max(1, int(count / design_effect(values, float(np.quantile(values, q)), q)))
    below = _binomial_cdf(effective, q)
    # P(B <= r): of ranks from 1, low is the last with P(B <= rank - 1) <= 2.5 %, high the first with >= 97.5 %
    low = int(np.searchsorted(below, 0.025, side="right"))
    high = int(np.searchsorted(below, 0.975, side="left")) + 1
    scale = count / effective
    low_rank, high_rank = int(low * scale), int(np.ceil(high * scale))
    return (
        float(ordered[low_rank - 1]) if low_rank >= 1 else None,
        float(ordered[high_rank - 1]) if high_rank <= count else None,
    )


def design_effect(samples: Array, estimate: float, q: float) -> float:
    """How many samples of this run are worth one independent one, at least 1.

    The share of samples below ``estimate`` in each of 20 blocks of time scatters more than that of independent samples
    would (batch means; for quantiles: Woodruff, JASA 47, 1952, with clusters).  It sees dependence over times shorter
    than a block, a twentieth of the run, and the run must be long against that.
    """
    few = len(samples) < _FEW
    blocks, t95 = (_FEW_BLOCKS, _FEW_T95) if few else (_BLOCKS, _T95)
    blocks = min(blocks, len(samples))
    if blocks < 2:
        return 1.0
    shares = np.array([part.mean() for part in np.array_split(samples <= estimate, blocks)])
    independent = q * (1 - q) / len(samples)
    return max(1.0, float(shares.var(ddof=1)) / blocks / independent * (t95 / _Z95) ** 2)


def _binomial_cdf(n: int, q: float) -> Array:
    """P(Binomial(n, q) <= k) for k = 0..n, from the ratios of neighbouring probabilities."""
    k = np.arange(n)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - k) / (k + 1)) + np.log(q / (1 - q)))])
    weights = np.exp(logs - logs.max())
    cumulative: Array = np.cumsum(weights) / weights.sum()
    return cumulative
