"""Labelled pictures as the Trainer wants them: decoded when it is their turn, because all at once are gigabytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from deployfa.data import Row, label_ids
from deployfa.metrics import Scores, score
from deployfa.preprocess import ImagePreprocessor, ImageSteps
from deployfa.preprocess.image import PIXELS

__all__ = ["ImageExamples"]

_BATCH = 64


class ImageExamples:
    """See ``deployfa.training.examples.Examples``."""

    by_length = False

    def __init__(self, steps: ImageSteps, labels: Sequence[str]) -> None:
        self._preprocessor = ImagePreprocessor(steps)
        self._labels = list(labels)

    def dataset(self, rows: Sequence[Row]) -> Dataset[dict[str, Any]]:
        return _Pictures(rows, label_ids(rows, self._labels))

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``pixel_values``, float32 (batch, channels, height, width), and ``labels`` (batch,)."""
        pixels = self._pixels([row["row"] for row in rows])
        return {PIXELS: pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    def score(
        self, model: nn.Module, rows: Sequence[Row], *, label: str, progress: Callable[[str, int, int], None] | None
    ) -> Scores:
        device = next(model.parameters()).device
        predicted = np.zeros(len(rows), dtype=np.int64)
        with torch.inference_mode():
            for start in range(0, len(rows), _BATCH):
                pixels = self._pixels(rows[start : start + _BATCH]).to(device)
                logits = model(**{PIXELS: pixels}).logits
                predicted[start : start + len(pixels)] = logits.argmax(-1).cpu().numpy()
                if progress:
                    progress(f"scoring {label}".strip(), min(start + _BATCH, len(rows)), len(rows))
        return score(predicted, np.array(label_ids(rows, self._labels), dtype=np.int64))

    def _pixels(self, rows: Sequence[Row]) -> torch.Tensor:
        feeds = self._preprocessor.encode([row.item for row in rows], names=[row.text for row in rows])
        return torch.from_numpy(feeds[PIXELS])


class _Pictures(Dataset[dict[str, Any]]):
    def __init__(self, rows: Sequence[Row], labels: Sequence[int]) -> None:
        self._rows = list(rows)
        self._labels = list(labels)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": self._rows[index], "labels": self._labels[index]}
