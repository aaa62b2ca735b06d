"""Save what a model's preprocessing needs beside its graph, and say how it works."""

from __future__ import annotations

from pathlib import Path

from deployfa.preprocess import Preprocessing
from deployfa.training.base import Base
from deployfa.training.tokenizer import save_tokenizer

__all__ = ["save_preprocessor"]


def save_preprocessor(base: Base, folder: Path) -> Preprocessing:
    """Write the files of the preprocessor of ``base`` into the existing ``folder``.

    Raises ``InputError`` if the model brings none that works without PyTorch.
    """
    save_tokenizer(base.name, folder)
    return Preprocessing(kind=base.does.kind, max_length=base.max_length)
