"""What is known of each adapter of a served model, and which of those in memory was not used for the longest.

Bookkeeping only: every method is short, and nothing is read, written or compared under the lock.
"""

from __future__ import annotations

import difflib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import msgspec

from deployfa.errors import DeployfaError, InputError
from deployfa.serving.holders import AdapterFacts
from deployfa.tables.checks import BASE

__all__ = ["AdapterInfo", "Catalogue", "Entry"]

#: An unknown name comes from whoever sends a request: it is compared with so many at most, of so many looked at.  1 ms.
_COMPARED, _LOOKED_AT = 100, 10_000
_LONGEST = 128


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter of a served model.

    ``method`` and ``parameters``, trained numbers without replaced modules, are ``None`` where they are not known: of a
    file that was not loaded yet, or that does not say.  ``bytes``: in memory, or what it would take there.
    ``resident``: in memory now; ``pinned``: never evicted; ``hits``: how often a request took it; ``loads``: how often
    it was put into memory; ``last_used``: by a request, seconds since 1970.
    """

    name: str
    method: str | None
    labels: tuple[str, ...]
    parameters: int | None
    bytes: int
    resident: bool
    pinned: bool
    hits: int
    loads: int
    last_used: float | None


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter.  ``refused``: the identity of a file that could not be loaded, and why."""

    name: str
    pinned: bool
    resident: bool = False
    facts: AdapterFacts | None = None
    hits: int = 0
    loads: int = 0
    last_used: float | None = None
    refused: tuple[tuple[int, ...], DeployfaError] | None = None

    def info(self, row_bytes: int) -> AdapterInfo:
        facts = self.facts or AdapterFacts("", (), None, row_bytes)
        return AdapterInfo(
            name=self.name,
            method=facts.method or None,
            labels=facts.labels,
            parameters=facts.parameters,
            bytes=facts.bytes,
            resident=self.resident,
            pinned=self.pinned,
            hits=self.hits,
            loads=self.loads,
            last_used=self.last_used,
        )


class Catalogue:
    """Entries by name, and counters.  Thread-safe."""

    def __init__(self, own: Mapping[str, AdapterFacts]) -> None:
        """``own``: what is in memory from the start and never evicted, the base first."""
        self._lock = threading.Lock()
        self._entries = {name: Entry(name, pinned=True, resident=True, facts=facts) for name, facts in own.items()}
        self._own = frozenset(own)
        #: what may be evicted, the one that was not used for the longest first
        self._recent: OrderedDict[str, None] = OrderedDict()
        self._counters = {"loads": 0, "evictions": 0, "replacements": 0, "failures": 0}

    @property
    def own(self) -> frozenset[str]:
        return self._own

    @property
    def counters(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counters)

    @property
    def evictable(self) -> int:
        """How many are in memory that may be evicted."""
        return len(self._recent)

    def count(self, what: str) -> None:
        with self._lock:
            self._counters[what] += 1

    def find(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def known(self, name: str) -> Entry:
        """Raises ``InputError``, with the nearest names, if there is none."""
        entry = self._entries.get(name)
        if entry is None:
            raise self._unknown(name)
        return entry

    def add(self, entries: Iterable[Entry]) -> None:
        """Make known what is not yet."""
        with self._lock:
            for entry in entries:
                self._entries.setdefault(entry.name, entry)

    def placed(self, entry: Entry, facts: AdapterFacts) -> None:
        """It is in memory now."""
        with self._lock:
            self._entries[entry.name] = entry
            entry.facts, entry.resident, entry.refused = facts, True, None
            entry.loads += 1
            self._counters["loads"] += 1
            if not entry.pinned:
                self._recent[entry.name] = None
                self._recent.move_to_end(entry.name)

    def left(self, entry: Entry, *, forget: bool = False) -> bool:
        """It is not in memory any more, or not even known; returns whether it was in memory."""
        with self._lock:
            self._recent.pop(entry.name, None)
            if forget:
                del self._entries[entry.name]
            was, entry.resident = entry.resident, False
            return was

    def evicted(self, but: str) -> str | None:
        """The one that was not used for the longest, ``but`` that one, which is not in memory any more."""
        with self._lock:
            name = next((each for each in self._recent if each != but), None)
            if name is not None:
                del self._recent[name]
                self._entries[name].resident = False
                self._counters["evictions"] += 1
            return name

    def used(self, entry: Entry) -> None:
        """A request took it."""
        now = time.time()
        with self._lock:
            entry.hits += 1
            entry.last_used = now
            if entry.name in self._recent:
                self._recent.move_to_end(entry.name)

    def order(self, newest_first: Sequence[str]) -> None:
        """Let these have been used in that order, and before all others."""
        with self._lock:
            for name in newest_first:
                if name in self._recent:
                    self._recent.move_to_end(name, last=False)

    def entries(self) -> list[Entry]:
        """The base first, then what was there from the start, then the others in the order of their names."""
        with self._lock:
            found = list(self._entries.values())
        return sorted(found, key=lambda entry: (entry.name != BASE, entry.name not in self._own, entry.name))

    def some_names(self) -> str:
        """A few names and how many more there are, for a message."""
        with self._lock:
            shown, more = list(islice(self._entries, 6)), len(self._entries) - 6
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

    def _unknown(self, name: str) -> InputError:
        """``no adapter 'shp'; nearest names: shop``."""
        with self._lock:
            known = list(islice(self._entries, _LOOKED_AT))
        if len(known) > _COMPARED:
            alike = (each for each in known if each[:3] == name[:3] and abs(len(each) - len(name)) < 2)
            known = list(islice(alike, _COMPARED))
        near = difflib.get_close_matches(name, known, n=4) if len(name) <= _LONGEST else []
        shown = f"nearest names: {', '.join(near)}" if near else f"there are: {self.some_names()}"
        return InputError(f"no adapter {name[:_LONGEST]!r}; {shown}")
