"""Rows of data in the form that a task has them in."""

from __future__ import annotations

from pathlib import Path

from deployfa.data import Row, read_language, read_rows
from deployfa.image_data import read_pictures
from deployfa.tasks import Task

__all__ = ["rows_of"]


def rows_of(task: Task, path: Path, *, need_label: bool = True, most: int | None = None) -> list[Row]:
    """What a model that does ``task`` reads of ``path``, ``most`` rows from the top; raises ``DataError``."""
    if task.kind == "image":
        return read_pictures(path, need_label=need_label)[:most]
    return read_rows(path, need_label=need_label)[:most] if task.labelled else read_language(path, most=most)
