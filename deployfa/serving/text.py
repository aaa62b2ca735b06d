"""Sentences instead of tensors: the bundle's own preprocessing, and labels for answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.errors import InputError, RequestError
from deployfa.preprocess import TextPreprocessor

__all__ = ["LABEL", "SCORE", "TEXT", "TextInput", "labelled", "unmasked"]

#: The input that takes sentences, and the outputs that say what the numbers mean.
TEXT, LABEL, SCORE = "text", "label", "score"


class TextInput:
    """Sentences → the graph's own inputs."""

    def __init__(self, bundle: Bundle, inputs: Sequence[str]) -> None:
        self._preprocessor = TextPreprocessor(bundle.path, max_length=bundle.manifest.preprocessing.max_length)
        self._inputs = tuple(inputs)

    @property
    def pad_id(self) -> int:
        return self._preprocessor.pad_id

    def decoded(self, array: Array, max_rows: int) -> list[str]:
        """(rows,) or (rows, 1) of bytes → texts."""
        if array.dtype.kind != "O" or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
            raise RequestError(f"input '{TEXT}' has shape {list(array.shape)}; send BYTES of shape [rows]")
        if not 1 <= array.shape[0] <= max_rows:
            raise RequestError(f"the request has {array.shape[0]} texts; send 1 to {max_rows}, and more requests")
        texts = []
        for number, value in enumerate(array.reshape(-1), start=1):
            try:
                texts.append(value.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise RequestError(f"text {number} is not valid UTF-8; write it as UTF-8") from error
        return texts

    def encode(self, texts: Sequence[str]) -> dict[str, Array]:
        """(rows, longest), int64.  May take long for long texts: not for an event loop."""
        try:
            feeds = self._preprocessor.encode(texts)
        except InputError as error:
            raise RequestError(str(error)) from error
        return {name: feeds[name] for name in self._inputs}


def labelled(logits: Array, labels: Sequence[str]) -> Mapping[str, Array]:
    """(rows, labels) → ``label``, (rows,) of bytes, and ``score``, (rows,) float32: its softmax probability."""
    best = logits.argmax(axis=1)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)
    names = list(labels) if len(labels) == logits.shape[1] else [f"LABEL_{n}" for n in range(logits.shape[1])]
    label = np.empty(len(logits), object)
    label[:] = [names[index].encode() for index in best]
    score = shifted[np.arange(len(best)), best] / shifted.sum(axis=1)
    return {LABEL: label, SCORE: score.astype(np.float32)}


def unmasked(logits: Array) -> Array:
    """(rows, labels) without the columns at the end that are minus infinity: other adapters have more labels."""
    masked = [bool(column.all()) for column in np.isneginf(logits).T]
    if not masked or not masked[-1] or all(masked):
        return logits
    return logits[:, : len(masked) - masked[::-1].index(False)]
