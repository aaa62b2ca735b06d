"""The adapter that ``deployfa run --adapter`` puts into the slots of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deployfa.errors import InputError

if TYPE_CHECKING:
    from deployfa.bundle import Bundle
    from deployfa.runtimes.slots import SlotRunner

__all__ = ["swap"]


def swap(bundle: Bundle, slots: SlotRunner, adapters: list[str]) -> None:
    """The one adapter that is named into the slots, ``none`` out of them; without a name its own stays."""
    from deployfa.slots import slot_adapter

    if len(adapters) > 1:
        raise InputError("slots hold one adapter at a time; name one, or make a pack, which mixes: deployfa pack")
    for name in adapters:
        slots.swap(None if name == "none" else slot_adapter(bundle, slots, Path(name)))
