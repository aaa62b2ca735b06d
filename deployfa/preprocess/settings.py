"""What a bundle says of its preprocessing, so that a device feeds the model as training did."""

from __future__ import annotations

import msgspec

from deployfa.preprocess.image_steps import ImageSteps
from deployfa.tasks import Kind

__all__ = ["Preprocessing"]


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True):
    """``max_length``: the most tokens of a text, 1 of what has none.  ``image``: what is done to a picture."""

    kind: Kind
    max_length: int
    image: ImageSteps | None = None

    def __post_init__(self) -> None:
        if (self.kind == "image") != (self.image is not None):
            raise ValueError("a model of pictures, and no other, says in 'image' what is done to them")
