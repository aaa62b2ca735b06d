"""What a bundle says of its preprocessing, so that a device feeds the model as training did."""

from __future__ import annotations

import msgspec

from deployfa.tasks import Kind

__all__ = ["Preprocessing"]


class Preprocessing(msgspec.Struct, frozen=True, kw_only=True):
    """``max_length``: the most tokens of a text."""

    kind: Kind
    max_length: int
