"""What a refusal calls the thing that an adapter does not fit, and what it says to type instead."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SLOTS", "TABLE", "Words"]


@dataclass(frozen=True, kw_only=True)
class Words:
    """``name``: what is refused a row, as the subject of a sentence.

    ``other_base``, ``other_place``: what to do with an adapter of another base, and with one that edits what there is
    no place for; ``larger``: what makes more room, an option and its value follow.
    """

    name: str
    other_base: str
    other_place: str
    larger: str


TABLE = Words(
    name="the table",
    other_base="pack it with adapters of its own base",
    other_place="pack again with this adapter",
    larger="pack again with",
)
SLOTS = Words(
    name="the bundle",
    other_base="export an adapter of that base with --slots",
    other_place="export this adapter with --slots, or as a bundle of its own",
    larger="export the bundle again with --slots",
)
