"""Save a model's tokenizer as the files that ``deployfa.preprocess`` reads."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers

from deployfa.errors import InputError
from deployfa.training.base import quiet

__all__ = ["save_tokenizer"]


def save_tokenizer(name: str | Path, folder: Path) -> None:
    """Write ``tokenizer.json`` and its companions for model ``name`` into the existing ``folder``.

    Raises ``InputError`` if the model has no fast tokenizer.
    """
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
            tokenizer.save_pretrained(str(folder))
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot load the tokenizer of '{name}' ({first_line}); put tokenizer.json beside it"
        ) from error
    # what else transformers writes (templates with names, vocabularies of slow tokenizers) nobody reads
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"the tokenizer of '{name}' has no fast form (tokenizer.json); convert it with tokenizers")
