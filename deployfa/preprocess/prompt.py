"""Prompts → the feeds of a decoder that has read nothing yet: padded on the left, with an empty cache.

The names are those that Optimum and onnxruntime-genai use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from deployfa.edits import Array
from deployfa.errors import BundleError
from deployfa.preprocess.sentences import SENTENCES
from deployfa.preprocess.settings import Cache, Preprocessing
from deployfa.preprocess.text import TextPreprocessor

__all__ = ["KEPT", "PromptPreprocessor", "cache_names", "empty_cache", "positions"]

#: The input that says of which of the new tokens the logits are wanted.
KEPT = "logits_to_keep"


class PromptPreprocessor:
    """Tokenise, cut to ``max_length`` tokens, pad on the left to the longest row."""

    #: A prompt has as many logits as the vocabulary has words: fewer rows say as much.
    samples = SENTENCES[:16]

    def __init__(self, folder: Path, settings: Preprocessing) -> None:
        if settings.cache is None:
            raise BundleError(f"'{folder}' says nothing of the decoder's cache; export it again")
        self._folder, self._settings = folder, settings
        self._text = TextPreprocessor(folder, max_length=settings.max_length)
        self.cache = settings.cache

    def cut(self, max_length: int) -> PromptPreprocessor:
        """The same for shorter prompts."""
        shorter = min(max_length, self._settings.max_length)
        return PromptPreprocessor(self._folder, msgspec.structs.replace(self._settings, max_length=shorter))

    @property
    def max_length(self) -> int:
        return self._text.max_length

    @property
    def pad_id(self) -> int:
        return self._text.pad_id

    def lengths(self, items: Sequence[str]) -> list[int]:
        return [len(row) for row in self.tokens(items)]

    def tokens(self, items: Sequence[str]) -> list[list[int]]:
        """The ids of each text, not padded, and not ended: a tokenizer that ends every text would end the answer."""
        return self._text.openings(items)

    def encode(self, items: Sequence[str], *, length: int | None = None) -> dict[str, Array]:
        """``input_ids``, ``attention_mask``, ``position_ids``: int64 (batch, sequence); empty ``past_key_values``; and
        ``logits_to_keep``, the last token alone."""
        return self.feeds(self.tokens(items), length=length)

    def feeds(self, rows: Sequence[Sequence[int]], *, length: int | None = None) -> dict[str, Array]:
        """``encode`` for who has the tokens."""
        width = max(max(map(len, rows)), length or 0, 1)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            if row:
                ids[number, -len(row) :], mask[number, -len(row) :] = row, 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask),
            **empty_cache(self.cache, len(rows)),
            KEPT: np.array([width - 1], np.int64),
        }


def positions(mask: Array) -> Array:
    """(batch, sequence): the position of each token among those that are no padding, as ``generate`` counts them."""
    counted: Array = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int64)
    return counted


def cache_names(cache: Cache) -> Iterator[tuple[str, str]]:
    """The input and the output of each tensor of a cache, in order."""
    for layer in range(cache.layers):
        for part in ("key", "value"):
            yield f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"


def empty_cache(cache: Cache, batch: int) -> dict[str, Array]:
    """Input → (batch, heads, 0, head_size)."""
    return {name: np.zeros((batch, cache.heads, 0, cache.head_size), np.float32) for name, _ in cache_names(cache)}
