"""Prompts → token ids, and token ids → text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployfa.errors import InputError
from deployfa.preprocess.text import read_tokenizer

__all__ = ["TextStream", "Tokenizer"]


class Tokenizer:
    """A model's ``tokenizer.json``, without truncation and padding; ``tokenizers`` alone.

    Raises ``BundleError`` if there is none in ``folder``, ``MissingExtraError`` without tokenizers.
    """

    def __init__(self, folder: Path) -> None:
        self.inner = read_tokenizer(folder)
        # the file may carry those of training
        self.inner.no_truncation()
        self.inner.no_padding()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids.  special: whether the tokenizer adds its own, such as one for the beginning; a chat template has
        written them already.  Raises ``InputError`` for a text that is not valid UTF-8."""
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the prompt is not valid UTF-8; write it as UTF-8")
        return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


class TextStream:
    """The text of one row as its tokens come, never half a character, and where a stop string ends it.

    prompt: its token ids, which some tokenizers need to know whether a word begins.  stop: what ends the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""
        self._stream = _decode_stream(prompt)
        #: Whether a stop string was found; nothing comes after it.
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now: what may be the beginning of a stop string waits for what follows."""
        self._held += self._decode(token)
        found = [(place, text) for text in self._stop if (place := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)[0]], ""
            return piece
        waits = max((_overlap(self._held, text) for text in self._stop), default=0)
        piece, self._held = self._held[: len(self._held) - waits], self._held[len(self._held) - waits :]
        return piece

    def flush(self) -> str:
        """What was held back, once no more tokens come.  An incomplete character stays away."""
        piece, self._held = self._held, ""
        return piece

    def _decode(self, token: int) -> str:
        try:
            return self._stream.step(self._tokenizer.inner, token) or ""
        except Exception:  # the library raises nothing narrower, where bytes that are no text changed what it had said
            self._stream = _decode_stream(())
            return self._stream.step(self._tokenizer.inner, token) or ""


def _decode_stream(ids: Sequence[int]) -> Any:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(ids=list(ids), skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """How many last characters of ``text`` are the first ones of ``stop``, all of it aside."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
