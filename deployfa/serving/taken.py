"""What one request holds of its adapter, from its acceptance until its answer is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from deployfa.runtimes.slots import SlotAdapter
from deployfa.tables import Lease

__all__ = ["Taken", "TakenRow", "TakenSlot"]


class Taken(Protocol):
    """``name``: of the adapter, ``base`` for none; ``labels``: what its answers mean, empty if it does not say."""

    name: str
    labels: tuple[str, ...]

    def close(self) -> None:
        """Let go; a second call does nothing."""
        ...


@dataclass(slots=True)
class TakenRow:
    """A row of a table; ``lease`` keeps it as it is, whatever is replaced meanwhile, and is ``None`` where rows never
    change."""

    name: str
    labels: tuple[str, ...]
    row: int
    lease: Lease | None = None

    def close(self) -> None:
        if self.lease is not None:
            self.lease.close()


@dataclass(slots=True)
class TakenSlot:
    """What goes into the slots; ``None`` leaves them idle."""

    name: str
    labels: tuple[str, ...]
    adapter: SlotAdapter | None = field(default=None)

    def close(self) -> None:
        pass
