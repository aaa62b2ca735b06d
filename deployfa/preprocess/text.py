"""Text → feeds, with ``tokenizers`` alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deployfa.edits import Array
from deployfa.errors import BundleError, InputError, MissingExtraError
from deployfa.preprocess.sentences import SENTENCES

__all__ = ["CHAT_TEMPLATE", "TOKENIZER_FILES", "TextPreprocessor", "read_tokenizer"]

CHAT_TEMPLATE = "chat_template.jinja"
#: What a bundle needs of a tokenizer; the first is required.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)


_ENDLESS = 1 << 62


def read_tokenizer(folder: Path) -> Any:
    """The ``tokenizers.Tokenizer`` in ``folder``.

    Raises ``BundleError`` if there is none, ``MissingExtraError`` without tokenizers.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError("tokenizers", "cpu", "reading text") from error
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BundleError(f"'{folder}' has no tokenizer.json; save the model's fast tokenizer there")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise BundleError(f"'{file}' is no tokenizer ({error}); save the model's fast tokenizer there") from error


class TextPreprocessor:
    """Tokenise, truncate to ``max_length`` tokens (``None``: not at all), pad to the longest row."""

    samples = SENTENCES

    def __init__(self, folder: Path, *, max_length: int | None) -> None:
        self._tokenizer = read_tokenizer(folder)
        self.max_length = max_length or _ENDLESS
        pad_token = _pad_token(folder)
        pad_id = self._tokenizer.token_to_id(pad_token) if pad_token else None
        # the file may carry a fixed length from training; ours replaces it
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(pad_id=pad_id or 0, pad_token=pad_token or "[PAD]")

    def encode(self, texts: Sequence[str], *, length: int | None = None) -> dict[str, Array]:
        """``input_ids``, ``attention_mask``, ``token_type_ids``: int64 (batch, sequence).

        Padded to the longest row, or to ``length`` tokens if that is longer.
        """
        encodings = self._encode(texts)
        feeds = {
            "input_ids": np.array([e.ids for e in encodings], dtype=np.int64),
            "attention_mask": np.array([e.attention_mask for e in encodings], dtype=np.int64),
            "token_type_ids": np.array([e.type_ids for e in encodings], dtype=np.int64),
        }
        width = feeds["input_ids"].shape[1]
        if length is not None and length > width:
            for name, array in feeds.items():
                fill = self.pad_id if name == "input_ids" else 0
                feeds[name] = np.pad(array, ((0, 0), (0, length - width)), constant_values=fill)
        return feeds

    @property
    def pad_id(self) -> int:
        """The token id that fills up a row."""
        return int(self._tokenizer.padding["pad_id"])

    def openings(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that go on, not padded: special ones that the tokenizer puts before a text, and none of
        those that it puts behind."""
        found = []
        for encoding in self._encode(texts):
            # of the padding, and of what was put around the text; 0 for special tokens that the text itself spells out
            added = encoding.special_tokens_mask
            size = len(added)
            while size > self._before and added[size - 1]:
                size -= 1
            found.append([int(token) for token in encoding.ids[:size]])
        return found

    @cached_property
    def _before(self) -> int:
        """How many tokens the tokenizer puts before a text: an empty one does not show it."""
        added = self._tokenizer.encode("a").special_tokens_mask
        return next((place for place, special in enumerate(added) if not special), 0)

    def plain(self, text: str) -> list[int]:
        """The tokens of one text, without any that the tokenizer puts around it."""
        (encoding,) = self._encode([text], special=False)
        return [int(token) for token in encoding.ids]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, after truncation and without padding."""
        return [int(sum(e.attention_mask)) for e in self._encode(texts)]

    def _encode(self, texts: Sequence[str], *, special: bool = True) -> Any:
        for number, text in enumerate(texts, start=1):
            # bytes of a command line that are not UTF-8 arrive as lone surrogates
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"text {number} is not valid UTF-8; write it as UTF-8")
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=special)


def _pad_token(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            token = json.loads(file.read_text(encoding="utf-8")).get("pad_token")
            if isinstance(token, dict):
                token = token.get("content")
            if token:
                return str(token)
    return None
