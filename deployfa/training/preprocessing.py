"""Save what a model's preprocessing needs beside its graph, and say how it works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployfa.preprocess import CHAT_TEMPLATE, Generation, Preprocessing
from deployfa.training.base import Base
from deployfa.training.decoder import cache_of
from deployfa.training.picture_steps import steps_of
from deployfa.training.tokenizer import save_tokenizer

__all__ = ["generation_of", "save_preprocessor"]


def save_preprocessor(base: Base, folder: Path) -> Preprocessing:
    """Write the files of the preprocessor of ``base`` into the existing ``folder``.

    Raises ``InputError`` if the model brings none that works without PyTorch.
    """
    if base.does.kind == "image":
        # all that there is to say fits into the manifest
        return Preprocessing(kind="image", max_length=1, image=steps_of(base))
    save_tokenizer(base.name, folder)
    if base.does.kind != "prompt":
        return Preprocessing(kind=base.does.kind, max_length=base.max_length)
    return Preprocessing(
        kind="prompt",
        max_length=base.max_length,
        cache=cache_of(base.model),
        generation=generation_of(base, chat_template=(folder / CHAT_TEMPLATE).is_file()),
    )


def generation_of(base: Base, *, chat_template: bool = False) -> Generation:
    """When a decoder is done, as its checkpoint says."""
    model: Any = base.model
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    pad = model.generation_config.pad_token_id
    # some checkpoints say -1 for none
    has_pad = pad is not None and pad >= 0
    return Generation(
        eos_token_ids=[int(end) for end in ends],
        pad_token_id=int(pad if has_pad else ends[0] if ends else 0),
        max_positions=base.max_length,
        chat_template=chat_template,
    )
