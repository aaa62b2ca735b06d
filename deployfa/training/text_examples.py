"""Rows of text and label as the Trainer wants them: encoded once, padded per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from deployfa.data import Row, label_ids
from deployfa.metrics import Labels, Scores, score
from deployfa.preprocess import TextPreprocessor
from deployfa.training.samples import text_inputs

__all__ = ["TextExamples"]

_BATCH = 64


class TextExamples:
    """See ``deployfa.training.examples.Examples``."""

    by_length = True

    def __init__(self, model: nn.Module, folder: Path, labels: Sequence[str], *, max_length: int) -> None:
        self._preprocessor = TextPreprocessor(folder, max_length=max_length)
        self._names = list(text_inputs(model))
        self._labels = list(labels)

    def dataset(self, rows: Sequence[Row]) -> Dataset[dict[str, Any]]:
        return _Encoded(self._preprocessor, [row.text for row in rows], label_ids(rows, self._labels))

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Padded to the longest row.  int64 (batch, sequence) per input and ``labels`` (batch,)."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in self._names:
            fill = self._preprocessor.pad_id if name == "input_ids" else 0
            batch[name] = torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    def score(
        self, model: nn.Module, rows: Sequence[Row], *, label: str, progress: Callable[[str, int, int], None] | None
    ) -> Scores:
        predicted = self._predict(model, [row.text for row in rows], label, progress)
        return score(predicted, np.array(label_ids(rows, self._labels), dtype=np.int64))

    def _predict(
        self, model: nn.Module, texts: Sequence[str], label: str, progress: Callable[[str, int, int], None] | None
    ) -> Labels:
        """The label id of every text, int64 (rows,); rows are batched by length so that padding costs little."""
        order = np.argsort(self._preprocessor.lengths(texts), kind="stable")
        device = next(model.parameters()).device
        predicted = np.zeros(len(texts), dtype=np.int64)
        with torch.inference_mode():
            for start in range(0, len(order), _BATCH):
                chosen = order[start : start + _BATCH]
                feeds = self._preprocessor.encode([texts[i] for i in chosen])
                batch = {name: torch.from_numpy(feeds[name]).to(device) for name in self._names}
                predicted[chosen] = model(**batch).logits.argmax(-1).cpu().numpy()
                if progress:
                    progress(f"scoring {label}".strip(), min(start + _BATCH, len(order)), len(order))
        return predicted


class _Encoded(Dataset[dict[str, Any]]):
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
