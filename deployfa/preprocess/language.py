"""Texts and prompts with completions → tokens to learn, for training and for perplexity alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deployfa.errors import DataError
from deployfa.preprocess.text import TextPreprocessor

__all__ = ["Piece", "pieces"]

#: Tokens of a text are cut from this many characters at most, so that a long file is not encoded as one.
_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Tokens that a model reads at once; it learns, or is judged on, those from ``start`` on (at least the second)."""

    tokens: tuple[int, ...]
    start: int = 1

    @property
    def learnt(self) -> int:
        return len(self.tokens) - self.start


def pieces(folder: Path, texts: Sequence[tuple[str, str | None]], *, max_length: int, end: int | None) -> list[Piece]:
    """``texts``, each with its completion if it is a prompt, as pieces of at most ``max_length`` tokens, in order.

    A text that is longer becomes several pieces.  ``end`` is put behind every text and completion, so that the model
    learns to stop.  Of a prompt that leaves no room for its completion the front is cut off.  Raises ``DataError`` if
    nothing is left to learn.
    """
    tokenizer = TextPreprocessor(folder, max_length=None)
    found: list[Piece] = []
    for text, completion in texts:
        found += _of_text(tokenizer, text, completion, max_length, () if end is None else (end,))
    if not found:
        raise DataError("the rows are of one token each, so there is nothing to go on to; give longer texts")
    return found


def _of_text(
    tokenizer: TextPreprocessor, text: str, answer: str | None, longest: int, end: tuple[int, ...]
) -> list[Piece]:
    if answer is None:
        tokens = (*_tokens(tokenizer, text), *end)
        cut = [tokens[start : start + longest] for start in range(0, len(tokens), longest)]
        return [Piece(each) for each in cut if len(each) > 1]
    prompt = _tokens(tokenizer, text)
    # the completion goes on where the prompt ends: no special tokens between them
    completion = (*tokenizer.plain(answer), *end)[: longest - 1]
    prompt = prompt[max(0, len(prompt) + len(completion) - longest) :]
    return [Piece((*prompt, *completion), start=max(1, len(prompt)))] if prompt and completion else []


def _tokens(tokenizer: TextPreprocessor, text: str) -> tuple[int, ...]:
    parts = [text[start : start + _CHARACTERS] for start in range(0, len(text), _CHARACTERS)]
    return tuple(token for part in parts for token in tokenizer.ids(part))
