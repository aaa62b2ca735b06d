"""The seam between what people have (texts, pictures, prompts) and what a graph is fed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from deployfa.edits import Array
from deployfa.preprocess.image import ImagePreprocessor
from deployfa.preprocess.prompt import PromptPreprocessor
from deployfa.preprocess.settings import Preprocessing
from deployfa.preprocess.text import TextPreprocessor

__all__ = ["Preprocessor", "open_preprocessor"]


class Preprocessor(Protocol):
    """``samples``: what a reference is computed on when nobody brings data, enough rows to judge by."""

    @property
    def samples(self) -> Sequence[Any]: ...

    @property
    def max_length(self) -> int: ...

    def encode(self, items: Sequence[Any], *, length: int | None = None) -> dict[str, Array]:
        """Input of the graph → its array, the batch first in the first of them; padded to ``length`` tokens where
        rows can have several lengths."""
        ...

    def lengths(self, items: Sequence[Any]) -> list[int]:
        """How long each item is: rows of one length need no padding."""
        ...


def open_preprocessor(folder: Path, settings: Preprocessing) -> Preprocessor:
    """The preprocessor whose files lie in ``folder``: of a bundle, or of a base graph in the cache."""
    if settings.image is not None:
        return ImagePreprocessor(settings.image)
    if settings.kind == "prompt":
        return PromptPreprocessor(folder, settings)
    return TextPreprocessor(folder, max_length=settings.max_length)
