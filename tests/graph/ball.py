"""Numbers with a bound on how far a rewritten graph may be from them: what the property tests compare with.

A ball is a float64 value and a radius.  The value is computed step by step as the algebra says, T before the layer,
with nothing folded.  The radius begins at nought on what is fed.  Every layer, and every norm, adds ``4 u`` times the
sum of the absolute values of the terms that it adds up, u the unit roundoff of the dtype that its numbers are stored
in.  Where the 4 comes from: a placement stores products of the graph's numbers and the edit's, each rounded once, so a
term is wrong by at most (1 + u)^n - 1 for the n stored numbers in it that were rounded:

- own weight: W' is rounded once, once more if the layer is then the producer for another site, c' likewise: n = 2
- side op: 1 + λ; or A and s B; or A and s W B with a W that was rounded as a producer: n <= 3
- norm: γ' and β' are rounded once; once more for a second site only if it is another stored number: n = 1
- producer: counted at the producer, as its own W' and c'

(1 + u)^3 - 1 < 4 u, and the rest is more than the noise of float64 sums of fewer than 2^10 terms: 2^-43 against
u = 2^-24.  Everything is drawn with an absolute value in [1/16, 2], so that no product falls under 2^-14, where halves
lose relative precision.  A radius then passes through the graph as the operator's own slope says; none is fitted.
Every step adds ``NOISE`` of what it sums, for the float64 of both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

#: float64 sums of up to 2^6 terms, in two implementations.
NOISE = 2.0**-46


class Ambiguous(Exception):
    """A number so near to the middle between two integers that its ball rounds to both."""


@dataclass(frozen=True, eq=False)
class Ball:
    """Within ``radius`` of ``center``, element by element; both float64 and of one shape."""

    center: np.ndarray
    radius: np.ndarray

    @classmethod
    def exact(cls, array):
        center = np.asarray(array).astype(np.float64)
        return cls(center, np.zeros_like(center))

    @property
    def shape(self):
        return self.center.shape

    @property
    def largest(self):
        """Of the absolute value."""
        return np.abs(self.center) + self.radius

    def holds(self, array):
        return bool(self.center.shape == np.shape(array) and np.all(np.abs(array - self.center) <= self.radius))

    def moved(self, move):
        """What only moves numbers: a view, a part, a repetition."""
        return Ball(move(self.center), move(self.radius))

    def __add__(self, other):
        radius = self.radius + other.radius + NOISE * (np.abs(self.center) + np.abs(other.center))
        return Ball(self.center + other.center, radius)

    def __mul__(self, other):
        return self.linear(other, np.multiply)

    def __matmul__(self, other):
        return self.linear(other, np.matmul)

    def linear(self, other, product):
        """A ``product`` that is linear in each operand and keeps positive numbers positive."""
        center, most = product(self.center, other.center), product(self.largest, other.largest)
        return Ball(center, most - product(np.abs(self.center), np.abs(other.center)) + NOISE * most)

    def through(self, function, slope=1.0):
        """``function``, element by element, nowhere steeper than ``slope``."""
        center = function(self.center)
        return Ball(center, slope * self.radius + NOISE * np.abs(center))


def unit(dtype):
    """u: half the distance from 1 to the next number."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def rounded(magnitude, dtype):
    """4 u of the sum of absolute values of what is added up, see above."""
    return 4 * unit(dtype) * magnitude


def softmax(ball):
    """Along the last axis.  Each weight is a quotient of exponentials: at most exp(2 r) times what it was."""
    e = np.exp(ball.center - ball.center.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return Ball(p, p * (np.expm1(2 * ball.radius.max(axis=-1, keepdims=True)) + NOISE))


def standardize(ball, axes, epsilon, *, center=True):
    """``(x - mean) / sqrt(var + ε)`` (layer norm) or ``x / sqrt(mean(x²) + ε)`` (RMS norm) over ``axes``.

    The Jacobian is 1/σ times a matrix between nought and the identity, so the Euclidean distance grows by at most 1/σ;
    σ is nowhere in the ball smaller than at its center less the distance over sqrt(n).
    """
    x = ball.center
    mean = x.mean(axis=axes, keepdims=True) if center else 0.0
    sigma = np.sqrt(((x - mean) ** 2).mean(axis=axes, keepdims=True) + epsilon)
    distance = np.sqrt((ball.radius**2).sum(axis=axes, keepdims=True))
    count = np.prod([x.shape[axis] for axis in axes])
    least = np.maximum(sigma - distance / np.sqrt(count), np.sqrt(epsilon))
    distance = distance + NOISE * np.abs(x).sum(axis=axes, keepdims=True)
    return Ball((x - mean) / sigma, np.broadcast_to(distance / least, x.shape))


def to_integers(ball, low, high):
    """Round to even and clip; raises ``Ambiguous`` where the ball has numbers that round to different ones."""
    least, most = (np.clip(np.rint(ball.center + sign * ball.radius), low, high) for sign in (-1, 1))
    # a tie is decided by the last bit of the division before it
    near = np.abs(np.abs(ball.center - np.floor(ball.center)) - 0.5) < 1e-9
    if (least != most).any() or (near & (ball.center > low) & (ball.center < high)).any():
        raise Ambiguous
    return least


def convolve(x, w, *, strides, pads, dilations, groups):
    """``y[n, o, t] = Σ_{i, m} w[o, i, m] x[n, g(o) k/groups + i, t stride + m dilation - pad]``, as the page of Conv
    says; pads: (before…, after…)."""
    rank, (d, per_group) = w.ndim - 2, w.shape[:2]
    around = list(zip(pads[:rank], pads[rank:], strict=True))
    x = np.pad(x, [(0, 0), (0, 0), *around])
    reach = [(m - 1) * dilation + 1 for m, dilation in zip(w.shape[2:], dilations, strict=True)]
    windows = sliding_window_view(x, reach, axis=tuple(range(2, 2 + rank)))
    stepped = tuple(slice(None, None, step) for step in (*strides, *dilations))
    windows = windows[(slice(None), slice(None), *stepped)]
    parts = []
    for group in range(groups):
        own = windows[:, group * per_group : (group + 1) * per_group]
        kernel = w[group * (d // groups) : (group + 1) * (d // groups)]
        axes = [1, *range(2 + rank, 2 + 2 * rank)], [1, *range(2, 2 + rank)]
        parts.append(np.moveaxis(np.tensordot(own, kernel, axes=axes), -1, 1))
    return np.concatenate(parts, axis=1)


def convolve_transposed(x, w, *, strides, pads, groups):
    """Every input number adds its kernel to the outputs: ``y[n, o, t stride + m - pad] += w[i, o, m] x[n, i, t]``, as
    the page of ConvTranspose says; w: (k, d/groups, *kernel)."""
    rank, (k, per_group) = w.ndim - 2, w.shape[:2]
    full = [(n - 1) * s + m for n, s, m in zip(x.shape[2:], strides, w.shape[2:], strict=True)]
    y = np.zeros((x.shape[0], per_group * groups, *full))
    for at in np.ndindex(*x.shape[2:]):
        place = tuple(slice(t * s, t * s + m) for t, s, m in zip(at, strides, w.shape[2:], strict=True))
        for group in range(groups):
            inputs = slice(group * (k // groups), (group + 1) * (k // groups))
            outputs = slice(group * per_group, (group + 1) * per_group)
            y[(slice(None), outputs, *place)] += np.tensordot(x[(slice(None), inputs, *at)], w[inputs], axes=(1, 0))
    cut = tuple(slice(before, n - after) for before, after, n in zip(pads[:rank], pads[rank:], full, strict=True))
    return y[(slice(None), slice(None), *cut)]
