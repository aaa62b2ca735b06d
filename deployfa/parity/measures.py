"""Error against what: every figure here names its denominator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from deployfa.edits import Array
from deployfa.metrics import Labels, mcnemar_exact, score
from deployfa.parity.report import Stage

__all__ = ["LIMIT", "failure", "measure", "normwise", "unmasked"]

#: A stage passes when its error is at most this many times the model's own float32-versus-float64 noise.
LIMIT = 2.0


def unmasked(found: Array, truth: Array) -> tuple[Array, Array]:
    """Both, with what is masked in both (minus infinity: a label that this row's adapter has not) set to the row's
    lowest true logit; masked in one alone stays as it is, which is no finite answer."""
    masked = np.isneginf(truth)
    if not masked.any():
        return found, truth
    lowest = np.where(masked, np.inf, truth).min(-1, keepdims=True)
    return np.where(masked & np.isneginf(found), lowest, found), np.where(masked, lowest, truth)


def normwise(found: Array, truth: Array) -> float:
    """``‖found - truth‖ / ‖truth‖`` (Frobenius); NaN stays NaN."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def measure(
    name: str,
    outputs: Sequence[Array],
    truths: Sequence[Array],
    bases: Sequence[Array],
    *,
    noise: float,
    noise_max_abs: float,
    data: npt.NDArray[np.bool_] | None = None,
    labels: Labels | None = None,
    truth_right: npt.NDArray[np.bool_] | None = None,
) -> Stage:
    """Hold one stage's ``outputs``, a list of (batch, labels), against the truth.

    NaN or infinity never passes.  A label flip counts as outside the noise when the truth's margin between its two best
    labels is above what two logits, each wrong by ``LIMIT`` times the noise, can close.  ``data`` marks the rows that
    ``labels`` belong to, in order.
    """
    found, truth, base = (np.concatenate([a.astype(np.float64) for a in arrays]) for arrays in (outputs, truths, bases))
    base, _ = unmasked(base, truth)
    found, truth = unmasked(found, truth)
    finite = bool(np.isfinite(found).all())
    difference = float(np.linalg.norm(found - truth)) if finite else None
    effect = float(np.linalg.norm(truth - base))
    error = difference / float(np.linalg.norm(truth)) if difference is not None else None
    predicted, wanted = found.argmax(-1), truth.argmax(-1)
    flipped = predicted != wanted
    best = np.sort(truth, axis=-1)
    margin = best[:, -1] - best[:, -2] if truth.shape[-1] > 1 else np.full(len(truth), np.inf)
    outside = flipped & (margin > 2 * LIMIT * noise_max_abs)
    accuracy = p_value = None
    if labels is not None and data is not None and truth_right is not None:
        right = predicted[data] == labels
        accuracy = score(predicted[data].astype(np.int64), labels).accuracy
        p_value = mcnemar_exact(int((right & ~truth_right).sum()), int((~right & truth_right).sum()))
    return Stage(
        name=name,
        error=error,
        noise_ratio=error / noise if error is not None and noise > 0 else None,
        max_abs=float(np.abs(found - truth).max()) if finite else None,
        effect_error=difference / effect if difference is not None and effect > 0 else None,
        finite=finite,
        flips=int(flipped.sum()),
        flips_outside_noise=int(outside.sum()),
        accuracy=accuracy,
        mcnemar_p=p_value,
        passed=error is not None and error <= LIMIT * noise and not bool(outside.any()),
    )


def failure(stage: Stage) -> str | None:
    """Why ``stage`` does not pass, in words; ``None`` if it does."""
    if not stage.finite:
        return f"{stage.name}: NaN or infinity in the output"
    if stage.flips_outside_noise:
        return f"{stage.name}: {stage.flips_outside_noise} label flips that noise does not explain"
    if not stage.passed:
        times = stage.noise_ratio or float("inf")
        return f"{stage.name}: error is {times:.1f}x the float32 noise, the limit is {LIMIT:g}x"
    return None
