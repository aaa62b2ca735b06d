"""A GGUF file as a directory that ``from_pretrained`` loads: weights dequantised to float32."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
import transformers

from deployfa.errors import InputError, MissingExtraError
from deployfa.training.base import quiet

__all__ = ["convert_smollm2", "from_gguf"]


def convert_smollm2(source: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct, from the one file in ``source``, into the existing folder ``out``."""
    (file,) = source.glob("*.gguf")
    from_gguf(file, out)


def from_gguf(file: Path, out: Path) -> None:
    """Write model, tokenizer and chat template of ``file``, a decoder that transformers knows, into the folder ``out``.

    Raises ``MissingExtraError`` without the gguf package and ``InputError`` for a file that transformers does not read.
    """
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("gguf", "train", "reading a GGUF file") from error
    where: dict[str, Any] = {"gguf_file": file.name}
    try:
        with quiet():
            read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read '{file}' ({first_line}); give a GGUF file of a decoder") from error
    # transformers does not save what it calls quantised: the same numbers in a model that never was
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    settings.pop("_model_name_or_path", None)
    plain = type(read)(type(read.config)(**settings))
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    with quiet():
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
