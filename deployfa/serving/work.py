"""One request on its way through the batcher."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deployfa.edits import Array
from deployfa.serving.taken import Taken

__all__ = ["Answered", "Work"]


@dataclass(frozen=True, slots=True)
class Answered:
    """What the model said to one request.  Times in seconds; ``batch_rows``: of the batch that it rode in.

    ``padding``: which share of that batch's positions, in [0, 1), was padding; ``input_s``: to put the batch together.
    """

    outputs: Mapping[str, Array]
    queue_s: float
    compute_s: float
    batch_rows: int
    padding: float
    input_s: float = 0.0


@dataclass(slots=True, eq=False)
class Work:
    """Rows that wait for the model.

    ``feeds``: input → (rows, …); ``length``: of the dimension that is padded, 1 where none is; ``group``: only works of
    one group share a batch; ``taken``: the adapter, held until the answer is made.  ``arrived``, ``deadline``:
    ``time.monotonic`` seconds.  ``done``: called once, from the batcher's thread, with an ``Answered`` or an exception.
    """

    feeds: Mapping[str, Array]
    rows: int
    length: int
    group: Hashable
    taken: Taken
    strength: float | None
    arrived: float
    deadline: float
    done: Callable[[Any], None]
    tag: float = 0.0
    order: int = 0
    cancelled: bool = field(default=False)

    @property
    def tokens(self) -> int:
        """What it costs, padding aside."""
        return self.rows * self.length

    def __lt__(self, other: Work) -> bool:
        return (self.tag, self.order) < (other.tag, other.order)
