"""What a base model is traced with, and what its graph is then checked with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deployfa.preprocess.image import PIXELS
from deployfa.preprocess.prompt import KEPT
from deployfa.training.base import Base
from deployfa.training.decoder import decoder_feeds
from deployfa.training.picture_steps import steps_of

__all__ = ["TEXT", "Sample", "sample_of", "text_inputs"]

Feeds = dict[str, torch.Tensor]
#: The dynamic axes of an input of token ids, by name.
TEXT = {0: "batch", 1: "sequence"}
#: And of a cached tensor.
PAST = {0: "batch", 2: "past_sequence"}


@dataclass(frozen=True, eq=False)
class Sample:
    """``traced``: keyword of ``forward`` → what the exporter sees.  ``dynamic``: input → axis → the name of the
    dimension there.  ``elsewhere``: feeds at another shape, of more rows, that the exporter does not see."""

    traced: Feeds
    dynamic: Mapping[str, Mapping[int, str]]
    elsewhere: Feeds


def sample_of(base: Base) -> Sample:
    """The sample for what ``base`` is fed."""
    if base.does.kind == "image":
        return _image(base)
    return _prompt(base.model) if base.does.kind == "prompt" else _text(base.model)


def _image(base: Base) -> Sample:
    """Elsewhere: three pictures, as the traced two of standard normal pixels."""
    steps = steps_of(base)
    pixels = torch.randn(5, steps.channels, steps.height, steps.width, generator=torch.Generator().manual_seed(0))
    return Sample({PIXELS: pixels[:2]}, {PIXELS: {0: "batch"}}, {PIXELS: pixels[2:]})


def _text(model: nn.Module) -> Sample:
    """Elsewhere: three rows of nine tokens, two of them padded."""
    traced = text_inputs(model)
    elsewhere = {name: torch.cat([t, t.flip(0)[:1]]).repeat(1, 2)[:, :9] for name, t in traced.items()}
    elsewhere["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 6 + [0] * 3])
    return Sample(traced, dict.fromkeys(traced, TEXT), elsewhere)


def text_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two rows of five tokens, the second padded by two: an all-ones mask would be traced away."""
    config: Any = model.config
    pad = int(getattr(config, "pad_token_id", None) or 0)
    vocabulary = int(config.vocab_size)
    ids = torch.tensor([[3, 4, 5, 6, 7], [7, 6, 5, pad, pad]]) % vocabulary
    feeds = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    if int(getattr(config, "type_vocab_size", 0) or 0) > 1:
        feeds["token_type_ids"] = torch.zeros_like(ids)
    return feeds


def _prompt(model: nn.Module) -> Sample:
    """Elsewhere: three rows, two of them padded, three tokens read before and five new ones."""
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 3], [9, 8, 7, 6, 5, 4, 3, 3], [5, 5, 6, 6, 7, 7, 8, 8]])
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, :1] = 0
    traced = decoder_feeds(model, ids[:2, :7], mask[:2, :7], past=4)
    axes: dict[str, Mapping[int, str]] = dict.fromkeys(traced, PAST)
    axes |= {"input_ids": TEXT, "position_ids": TEXT, "attention_mask": {0: "batch", 1: "total_sequence"}}
    return Sample(traced, {**axes, KEPT: {0: "kept"}}, decoder_feeds(model, ids, mask, past=3))
