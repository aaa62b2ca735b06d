"""Which token comes next, from the logits of one row.  numpy only.

Everything is per row, with a random generator of the row's own: who else is in a batch changes no draw.

Source: transformers' ``RepetitionPenaltyLogitsProcessor``, ``TemperatureLogitsWarper``, ``TopKLogitsWarper``,
``TopPLogitsWarper`` and ``MinPLogitsWarper``, in the order in which ``generate`` applies them.  One difference: they
penalise the padding of a batch too, and here a row has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deployfa.edits import Array
from deployfa.errors import RuntimeTargetError
from deployfa.generation.options import Options

__all__ = ["Sampler", "distribution"]

#: As many of the most likely tokens are looked at first, then more: sorting a whole vocabulary takes milliseconds.
_FIRST_LOOK = 256


class Sampler:
    """Chooses the tokens of one row, one after the other.  prompt: its token ids."""

    def __init__(self, options: Options, prompt: Sequence[int]) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        # a dict keeps each id once, in order; most rows have no penalty and need none of it
        self._seen = dict.fromkeys(prompt) if options.repetition_penalty != 1.0 else None

    def pick(self, logits: Array) -> int:
        """The next token; ``logits``: (vocabulary,), float32.

        Raises ``RuntimeTargetError`` if they hold no finite maximum: such a model has broken down.
        """
        if not np.isfinite(logits.max()):
            raise RuntimeTargetError("the model's logits are not finite; verify the bundle, or lower the strength")
        seen = None if self._seen is None else np.fromiter(self._seen, np.int64, len(self._seen))
        if self._options.temperature == 0:
            chosen = int(penalised(logits, seen, self._options.repetition_penalty).argmax())
        else:
            ids, probabilities = distribution(logits, self._options, seen)
            # in the order of ids: noise in the logits must not swap two neighbours under one draw
            order = np.argsort(ids)
            reached = np.cumsum(probabilities[order])
            place = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
            chosen = int(ids[order][min(int(place), len(ids) - 1)])
        if self._seen is not None:
            self._seen[chosen] = None
        return chosen


def penalised(logits: Array, seen: Array | None, penalty: float) -> Array:
    """Logits of the ids ``seen`` over ``penalty``, or times it where they are negative."""
    if seen is None or penalty == 1.0:
        return logits
    # an embedding may have more rows than the head has outputs
    ids = seen[seen < logits.size]
    result = logits.copy()
    result[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return result


def distribution(logits: Array, options: Options, seen: Array | None = None) -> tuple[Array, Array]:
    """Who may be drawn, and how likely: ids (n,) and their probabilities (n,), float64, the most likely first.

    logits: (vocabulary,), float32.  seen: ids of the prompt and of the answer so far.  ``options.temperature`` > 0.
    """
    scores = penalised(logits, seen, options.repetition_penalty) / np.float32(options.temperature)
    size = scores.size
    if 0 < options.top_k < size:
        kth = np.partition(scores, size - options.top_k)[size - options.top_k]
        # a tie with the last one stays, as in transformers
        ids = np.flatnonzero(scores >= kth)
        scores = scores[ids]
    else:
        ids = np.arange(size)
    weights = np.exp((scores - scores.max()).astype(np.float64))
    ids, weights = _most_likely(ids, weights, options)
    return ids, weights / weights.sum()


def _most_likely(ids: Array, weights: Array, options: Options) -> tuple[Array, Array]:
    """Those that top-p and then min-p leave, sorted; ``weights``: probabilities but for a factor, the greatest is 1."""
    total, look = weights.sum(), _FIRST_LOOK if options.top_p < 1 or options.min_p > 0 else weights.size
    while True:
        look = min(look, weights.size)
        top = np.argpartition(weights, weights.size - look)[weights.size - look :]
        # by weight, and among equals the lower id first
        top = top[np.lexsort((ids[top], -weights[top]))]
        found = weights[top]
        # transformers sums from below and removes what has no more than 1 - top_p under it and itself
        above = np.concatenate([[0.0], np.cumsum(found)[:-1]])
        kept = above < options.top_p * total if options.top_p < 1 else np.ones(look, bool)
        kept &= found >= options.min_p
        kept[0] = True
        if look == weights.size or not kept[-1]:
            return ids[top[kept]], found[kept]
        look *= 16
