"""Rows of text as the Trainer wants them: encoded once, padded per batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from deployfa.preprocess import TextPreprocessor

__all__ = ["EncodedRows", "pad_batch"]


class EncodedRows(Dataset[dict[str, list[int]]]):
    """Token ids per row, with labels; ``input_ids`` lets the Trainer group rows by length."""

    def __init__(self, preprocessor: TextPreprocessor, texts: Sequence[str], labels: Sequence[int]) -> None:
        lengths = preprocessor.lengths(texts)
        self._rows: list[dict[str, Any]] = []
        for start in range(0, len(texts), 256):
            feeds = preprocessor.encode(texts[start : start + 256])
            for row, length in enumerate(lengths[start : start + 256]):
                kept = {name: array[row, :length].tolist() for name, array in feeds.items()}
                self._rows.append({**kept, "labels": int(labels[start + row])})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def pad_batch(rows: Sequence[dict[str, Any]], *, pad_id: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Pad to the longest row of the batch.  Returns int64 (batch, sequence) per name and ``labels`` (batch,)."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name in names:
        fill = pad_id if name == "input_ids" else 0
        batch[name] = torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
    batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch
