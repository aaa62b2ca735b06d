"""Texts, and prompts with completions, as the Trainer wants them; perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from deployfa.data import Row
from deployfa.errors import DataError, InputError
from deployfa.metrics import Perplexity, perplexity
from deployfa.preprocess import Generation
from deployfa.preprocess.language import Piece, batches, pieces

__all__ = ["LanguageExamples", "check_causal", "log_likelihoods"]

#: Tokens of a batch when scoring: the logits of a vocabulary are large.
_TOKENS = 1024
#: What the loss leaves out.
_IGNORED = -100


class LanguageExamples:
    """See ``deployfa.training.examples.Examples``."""

    by_length = True

    def __init__(self, folder: Path, generation: Generation, *, max_length: int, vocabulary: int | None = None) -> None:
        """``vocabulary``: the words that the model knows; ``None``: whatever the tokenizer says."""
        self._folder = folder
        self._vocabulary = vocabulary
        self._pad = generation.pad_token_id
        self._end = generation.eos_token_ids[0] if generation.eos_token_ids else None
        self._max_length = max_length

    def dataset(self, rows: Sequence[Row]) -> Dataset[dict[str, Any]]:
        return _Pieces(self._pieces(rows))

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """int64 (batch, sequence), padded on the right; of ``labels``, what is not learnt is -100."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor([_IGNORED] * row["start"] + row["input_ids"][row["start"] :]) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self._pad),
            "attention_mask": pad([torch.ones_like(each) for each in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=_IGNORED),
        }

    def score(
        self, model: nn.Module, rows: Sequence[Row], *, label: str, progress: Callable[[str, int, int], None] | None
    ) -> Perplexity:
        """The perplexity of ``model``, and that of its base if an adapter can be switched off in it."""
        found = self._pieces(rows)
        own = perplexity(log_likelihoods(model, found, self._pad, label, progress), rows=len(rows))
        if not hasattr(model, "disable_adapter"):
            return own
        off: Any = model
        with off.disable_adapter():
            base = perplexity(log_likelihoods(model, found, self._pad, f"{label}, base", progress), rows=len(rows))
        return msgspec.structs.replace(own, base=base.perplexity)

    def _pieces(self, rows: Sequence[Row]) -> list[Piece]:
        texts = [(row.text, row.completion) for row in rows]
        found = pieces(self._folder, texts, max_length=self._max_length, end=self._end)
        largest = max(max(piece.tokens) for piece in found)
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise DataError(
                f"the tokenizer makes token {largest} of the rows, and the model knows {self._vocabulary} from 0 on; "
                "use the tokenizer that it was trained with, or resize its embeddings"
            )
        return found


def check_causal(model: nn.Module) -> None:
    """Raise ``InputError`` for a ``model`` whose tokens see those that come after them: it can only copy, not go on."""
    with torch.inference_mode():
        first, second = (model(input_ids=torch.tensor([[0, 1, last]])).logits[0, 1] for last in (2, 3))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        raise InputError(
            f"{type(model).__name__} sees what comes after a token, so it cannot go on from a prompt; pass a decoder"
        )


def log_likelihoods(
    model: nn.Module,
    found: Sequence[Piece],
    pad: int,
    label: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Of every token that is learnt, (tokens,): in the order of the lengths of their pieces."""
    device = next(model.parameters()).device
    parts: list[Any] = []
    done = 0
    with torch.inference_mode():
        for batch in batches(found, _TOKENS):
            width = len(batch[-1].tokens)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros_like(ids)
            for number, piece in enumerate(batch):
                ids[number, : len(piece.tokens)] = torch.tensor(piece.tokens)
                mask[number, : len(piece.tokens)] = 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, :-1].float()
            picked = logits.gather(2, ids[:, 1:, None].to(device))[..., 0]
            scores = (picked - logits.logsumexp(-1)).cpu().numpy()
            parts += [scores[n, piece.start - 1 : len(piece.tokens) - 1] for n, piece in enumerate(batch)]
            done += len(batch)
            if progress:
                progress(f"scoring {label}".strip(), done, len(found))
    return np.concatenate(parts)


class _Pieces(Dataset[dict[str, Any]]):
    """``input_ids`` lets the Trainer group rows by length."""

    def __init__(self, found: Sequence[Piece]) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> dict[str, Any]:
        piece = self._found[index]
        return {"input_ids": list(piece.tokens), "start": piece.start}
