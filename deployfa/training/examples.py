"""The seam between rows of data and the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import Dataset

from deployfa.data import Row
from deployfa.metrics import Perplexity, Scores
from deployfa.training.base import Base
from deployfa.training.image_examples import ImageExamples
from deployfa.training.language_examples import LanguageExamples, check_causal
from deployfa.training.options import FitOptions
from deployfa.training.picture_steps import image_steps
from deployfa.training.preprocessing import generation_of
from deployfa.training.text_examples import TextExamples

__all__ = ["Examples", "Progress", "Score", "examples_of"]

#: Called with (what, done, total).
Progress = Callable[[str, int, int], None]
#: How good a model is at a task with labels, and at one without.
Score = Scores | Perplexity


class Examples(Protocol):
    """``by_length``: whether the Trainer shall put rows of like length into one batch."""

    by_length: bool

    def dataset(self, rows: Sequence[Row]) -> Dataset[dict[str, Any]]:
        """What the model is trained on."""
        ...

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch: the keywords of ``forward``, ``labels`` among them."""
        ...

    def score(self, model: nn.Module, rows: Sequence[Row], *, label: str, progress: Progress | None) -> Score:
        """How good ``model``, in eval mode, is on ``rows``."""
        ...


def examples_of(base: Base, folder: Path, labels: Sequence[str], options: FitOptions) -> Examples:
    """Those of what ``base`` does; ``folder`` holds the files of its preprocessor.

    Raises ``InputError`` for a base that is to go on from prompts and cannot.
    """
    if base.does.kind == "image":
        return ImageExamples(image_steps(base.model, folder), labels)
    if base.does.kind == "prompt":
        check_causal(base.model)
        embeddings: Any = base.model.get_input_embeddings()  # type: ignore[operator]
        vocabulary = int(embeddings.weight.shape[0])
        return LanguageExamples(folder, generation_of(base), max_length=options.max_length, vocabulary=vocabulary)
    return TextExamples(base.model, folder, labels, max_length=options.max_length)
