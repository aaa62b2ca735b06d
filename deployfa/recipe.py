"""What a recipe in ``deployfa.models`` says about a model: what to adapt, how to feed it, how to train it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Data", "Recipe"]


@dataclass(frozen=True)
class Data:
    """Real rows that ``deployfa fetch NAME`` prepares: so many to train on, at most so many of each domain to score."""

    name: Literal["vader", "digits"]
    train_rows: int
    test_rows: int


@dataclass(frozen=True)
class Recipe:
    """Declarative; a model without one works from ``DEFAULTS`` of its task.

    ``sites``: PEFT ``target_modules`` (a regex or names).  ``learning_rate``: per method.  ``max_length``: training
    texts are cut there, in tokens.  ``batch_size``: rows per step.  ``epochs``: passes over the rows.  ``asset``: the
    name of the model in ``deployfa.base_models``, if it can be fetched.  ``sites_all``: every layer that can be
    adapted, where ``all-linear`` does not say it.  ``sites_attention``: the queries and values of a transformer alone.
    ``data``: what it is trained on if nobody brings rows.
    """

    name: str
    task: str
    about: str
    sites: str | tuple[str, ...] = "all-linear"
    learning_rate: Mapping[str, float] = field(
        default_factory=lambda: {"vefa": 5e-3, "lorfa": 1e-3, "lora": 1e-3, "full": 5e-5, "head": 1e-3}
    )
    max_length: int = 128
    batch_size: int = 32
    epochs: float = 2.0
    asset: str | None = None
    sites_all: str | tuple[str, ...] | None = None
    sites_attention: str | None = None
    data: Data | None = None
