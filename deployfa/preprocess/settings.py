"""What a bundle says of its preprocessing, so that a device feeds the model as training did."""

from __future__ import annotations

import msgspec

from deployfa.preprocess.image_steps import ImageSteps
from deployfa.tasks import Kind

__all__ = ["Cache", "Generation", "Preprocessing"]


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """The keys and values that a decoder hands on: ``layers`` times two tensors (batch, heads, past, head_size)."""

    layers: int
    heads: int
    head_size: int


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """``eos_token_ids``: after any of them a row is done.  ``max_positions``: the most tokens that the model can tell
    apart.  ``chat_template``: whether ``chat_template.jinja`` lies in the bundle."""

    eos_token_ids: list[int]
    pad_token_id: int
    max_positions: int
    chat_template: bool


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True):
    """``max_length``: the most tokens of a text; for prompts, of the prompt and what follows it together;
    1 of pictures.

    ``cache`` and ``generation``: of a decoder.  ``image``: what is done to a picture."""

    kind: Kind
    max_length: int
    cache: Cache | None = None
    generation: Generation | None = None
    image: ImageSteps | None = None

    def __post_init__(self) -> None:
        if (self.kind == "image") != (self.image is not None):
            raise ValueError("a model of pictures, and no other, says in 'image' what is done to them")
