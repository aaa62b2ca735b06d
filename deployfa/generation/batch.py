"""``Batch``: rows that are generated together: their caches, masks and positions, and rows leaving it.

Prompts are padded on the left, so that the last position of every row is its own.  A row that is done leaves at once:
its place is taken by the last row, so that a single row of the caches is copied and the others stay where they are.
At 16 rows of SmolLM2-135M and 256 tokens a row less saves 6 % of every step, and leaving costs 1 % of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deployfa.edits import Array
from deployfa.generation.decoder import Caches, Decoder, Run

__all__ = ["PREFILL_CHUNK", "Batch"]

#: Tokens of a row that are read at once: attention's scores grow with this times the tokens before.
PREFILL_CHUNK = 512
#: Columns that are padding in every row are cut off once they are this share of all.
_TRIM_SHARE = 0.25
#: The mask grows by as many columns.
_ROOM = 64


class Batch:
    """``requests``: (rows,) whose request each row is, by position; it changes as rows leave."""

    def __init__(
        self, decoder: Decoder, run: Run, prompts: Sequence[Sequence[int]], *, requests: Sequence[int]
    ) -> None:
        """prompts: token ids, none empty.  requests: what ``run`` takes."""
        self._decoder, self._run = decoder, run
        rows, width = len(prompts), max(map(len, prompts))
        self.requests = np.array(requests, np.int64)
        self._prompt = np.zeros((rows, width), np.int64)
        # its last columns are room for what follows
        self._mask = np.zeros((rows, width + _ROOM), np.int64)
        for row, prompt in enumerate(prompts):
            self._prompt[row, width - len(prompt) :] = prompt
            self._mask[row, width - len(prompt) : width] = 1
        self._lengths = np.array([len(prompt) for prompt in prompts])
        self._width = 0
        self._caches: Caches = decoder.empty(rows)

    def prefill(self, *, chunk: int = PREFILL_CHUNK) -> Array:
        """Read the prompts; → logits of what comes next, (rows, vocabulary).  chunk: tokens of a row at once."""
        width = self._prompt.shape[1]
        positions = np.clip(np.cumsum(self._mask[:, :width], axis=1) - 1, 0, None)
        for start in range(0, width, chunk):
            part = slice(start, min(start + chunk, width))
            logits = self._step(self._prompt[:, part], positions[:, part])
        return logits

    def advance(self, tokens: Sequence[int]) -> Array:
        """One token a row; → logits of what comes next, (rows, vocabulary)."""
        if self._width == self._mask.shape[1]:
            self._mask = np.pad(self._mask, ((0, 0), (0, _ROOM)))
        self._mask[:, self._width] = 1
        logits = self._step(np.array(tokens, np.int64)[:, None], self._lengths[:, None])
        self._lengths += 1
        return logits

    def _step(self, tokens: Array, positions: Array) -> Array:
        self._width += tokens.shape[1]
        mask = self._mask[:, : self._width]
        logits, self._caches = self._decoder.step(self._run, self.requests, tokens, mask, positions, self._caches)
        return logits

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Let ``rows`` leave, not all of them; → for every row that stays, in its new order, where it was."""
        order, moves = _leave(len(self.requests), rows)
        for each in (self.requests, self._lengths, self._mask):
            each[: len(order)] = each[order]
        stay = len(order)
        self.requests, self._lengths = self.requests[:stay], self._lengths[:stay]
        self._mask = self._mask[:stay]
        # the leftmost token of all rows; what lies before it is padding in every one
        first = int(self._mask[:, : self._width].argmax(axis=1).min())
        first = first if first >= _TRIM_SHARE * self._width else 0
        arrays = {}
        for name, value in self._caches.items():
            array = value.numpy()
            for place, source in moves:
                array[place] = array[source]
            arrays[name] = np.ascontiguousarray(array[:stay, :, first:])
        self._caches = self._decoder.values(arrays)
        self._mask, self._width = self._mask[:, first:], self._width - first
        return order


def _leave(count: int, rows: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows that stay in their new order, and the copies (place, source) that put them there."""
    gone = set(rows)
    stay = count - len(gone)
    # those beyond the end that stay move into the gaps before it
    movers = [row for row in range(stay, count) if row not in gone]
    gaps = [row for row in range(stay) if row in gone]
    moves = list(zip(gaps, movers, strict=True))
    order = list(range(stay))
    for place, source in moves:
        order[place] = source
    return order, moves
