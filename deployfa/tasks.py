"""What a model does, and with it what it is fed: one line a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deployfa.errors import InputError

__all__ = ["DEFAULT_TASK", "TASKS", "ZERO_SHOT", "Kind", "Task", "task_of"]

#: What a model is fed: texts, prompts that it goes on from, or pictures.
Kind = Literal["text", "prompt", "image"]


ZERO_SHOT = "zero-shot-image-classification"


@dataclass(frozen=True)
class Task:
    """``auto_class``: the class of transformers that loads a model for it.  ``labelled``: whether its answer is one of
    the labels of its rows."""

    name: str
    kind: Kind
    auto_class: str
    labelled: bool


_ALL = (
    Task("text-classification", "text", "AutoModelForSequenceClassification", labelled=True),
    Task("image-classification", "image", "AutoModelForImageClassification", labelled=True),
    # its head is made of the names of the labels: deployfa.training.zero_shot loads it
    Task(ZERO_SHOT, "image", "AutoModel", labelled=True),
    Task("text-generation", "prompt", "AutoModelForCausalLM", labelled=False),
)
DEFAULT_TASK = "text-classification"
TASKS = {task.name: task for task in _ALL}


def task_of(name: str) -> Task:
    """Raises ``InputError`` with the tasks there are."""
    if name not in TASKS:
        raise InputError(f"unknown task '{name}'; known tasks: {', '.join(TASKS)}")
    return TASKS[name]
