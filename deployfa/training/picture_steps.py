"""What is done to the pictures of a model, from its own files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils.hub import cached_file

from deployfa.errors import InputError
from deployfa.preprocess import ImageSteps
from deployfa.preprocess.image_steps import PREPROCESSOR_CONFIG, read_steps
from deployfa.tasks import Task
from deployfa.training.base import Base, quiet
from deployfa.training.tokenizer import save_tokenizer

__all__ = ["image_steps", "save_files", "steps_of"]

#: Kinds of model that take pictures of no other size than their configuration says.
_FIXED_SIZE = {"clip", "clip_vision_model", "deit", "deployfa_efficientnet_lite", "vit"}


def save_files(task: Task, name: str | Path, folder: Path) -> None:
    """Write the files that a model directory keeps for its preprocessing into the existing ``folder``.

    Raises ``InputError`` if model ``name`` has none.
    """
    if task.kind == "image":
        shutil.copyfile(_image_folder(name) / PREPROCESSOR_CONFIG, folder / PREPROCESSOR_CONFIG)
    else:
        save_tokenizer(name, folder)


def steps_of(base: Base) -> ImageSteps:
    """What is done to the pictures of ``base``; raises ``InputError`` if that is not known."""
    return image_steps(base.model, _image_folder(base.name))


def image_steps(model: nn.Module, folder: Path) -> ImageSteps:
    """The steps in ``folder``, for as many channels and pixels as ``model`` takes; raises ``InputError``."""
    config: Any = model.config
    vision = getattr(config, "vision_config", config)
    steps = read_steps(folder, channels=int(getattr(vision, "num_channels", 3)))
    size = getattr(vision, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size) if size is not None else None
    if sides is not None and config.model_type in _FIXED_SIZE and sides != (steps.height, steps.width):
        raise InputError(
            f"the model takes {sides[0]} x {sides[1]} pixels, but '{folder / PREPROCESSOR_CONFIG}' gives "
            f"{steps.height} x {steps.width}; make the two the same"
        )
    return steps


def _image_folder(name: str | Path) -> Path:
    """Where the ``preprocessor_config.json`` of model ``name``, a directory or hub id, lies."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / PREPROCESSOR_CONFIG).is_file():
            raise InputError(f"'{folder}' has no {PREPROCESSOR_CONFIG}; save the model's image processor there")
        return folder
    try:
        with quiet():
            found = cached_file(str(name), PREPROCESSOR_CONFIG)
    except (OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot read the {PREPROCESSOR_CONFIG} of '{name}' ({first_line}); pass --model DIR"
        ) from error
    assert found is not None  # it raises for a file that is not there
    return Path(found).parent
