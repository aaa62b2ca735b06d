"""Texts and prompts with completions → tokens to learn, for training and for perplexity alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployfa.errors import DataError, InputError
from deployfa.preprocess.text import TextPreprocessor

__all__ = ["Piece", "batches", "pieces"]

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


def batches(found: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """``found`` by length, so many to a batch that it has ``most`` tokens once padded: logits are large."""
    batch: list[Piece] = []
    for piece in sorted(found, key=lambda piece: len(piece.tokens)):
        if batch and (len(batch) + 1) * len(piece.tokens) > most:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def pieces(folder: Path, texts: Sequence[tuple[str, str | None]], *, max_length: int, end: int | None) -> list[Piece]:
    """``texts``, each with its completion if it is a prompt, as pieces of at most ``max_length`` tokens, in order.

    A text that is longer becomes several pieces; each goes on from the last token of the one before, so that every
    token but a text's first is learnt once, wherever the cuts are.  ``end`` is put behind every text and completion
    that does not end so, and the model learns to stop.  Of a prompt that leaves no room for its completion the front is
    cut off.

    Raises ``InputError`` for a ``max_length`` below 2, and ``DataError`` if nothing is left to learn.
    """
    if max_length < 2:
        raise InputError(
            f"max-length is {max_length}; a language model goes on from one token to another, so pass 2 up"
        )
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
    prompt = _tokens(tokenizer, text)
    if answer is None:
        tokens = _ended(prompt, end)
        return [Piece(tokens[start : start + longest]) for start in range(0, len(tokens) - 1, longest - 1)]
    completion = _ended(_completion(tokenizer, text, prompt, answer), end)[: longest - 1]
    prompt = prompt[max(0, len(prompt) + len(completion) - longest) :]
    return [Piece((*prompt, *completion), start=len(prompt))] if prompt and completion else []


def _completion(tokenizer: TextPreprocessor, text: str, prompt: tuple[int, ...], answer: str) -> tuple[int, ...]:
    """The tokens that go on from ``prompt``, those of ``text``, and say ``answer``.

    Those of the whole where it begins with the prompt's: SentencePiece writes a space before a text of its own.
    Otherwise a token of the whole lies across the border, and the model will be asked to go on from there.
    """
    whole = _tokens(tokenizer, text + answer)
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else tuple(tokenizer.plain(answer))


def _ended(tokens: tuple[int, ...], end: tuple[int, ...]) -> tuple[int, ...]:
    """With ``end`` behind them, once: a text may spell it out."""
    return tokens if end and tokens[-1:] == end else (*tokens, *end)


def _tokens(tokenizer: TextPreprocessor, text: str) -> tuple[int, ...]:
    """What the tokenizer puts before the text, and the text."""
    first, *rest = _parts(text)
    (tokens,) = tokenizer.openings([first])
    for part in rest:
        tokens += tokenizer.plain(part)
    return tuple(tokens)


def _parts(text: str) -> Iterator[str]:
    """Cut before a space, where there is one: tokenizers let no token go across that border."""
    start = 0
    while len(text) - start > _CHARACTERS:
        space = text.rfind(" ", start + 1, start + _CHARACTERS)
        cut = space if space > 0 else start + _CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]
