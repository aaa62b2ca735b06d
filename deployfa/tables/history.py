"""Which row a name has, and had: readers go on with what they began with, and no row is reused under them.

Time is counted in *epochs*, one for every change.  A version of a name is seen from the epoch in which it was published
until the one in which it was replaced or removed.  A lease fixes an epoch.  Once no lease can see a version, its row
may be overwritten.  So a lease costs the same for one adapter and for ten thousand, and so does a change.
"""

from __future__ import annotations

import heapq
import threading
from collections import Counter, deque
from collections.abc import Sequence

import msgspec

from deployfa.errors import InputError

__all__ = ["History", "Member", "Version"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an adapter beside its numbers.  ``parameters``: trained numbers, without replaced modules."""

    name: str
    method: str
    labels: tuple[str, ...] = ()
    parameters: int = 0


class Version:
    """One row of one name, and when it is seen; ``since`` is 0 before it is published (and the base's)."""

    __slots__ = ("member", "older", "row", "since", "until")

    def __init__(self, member: Member, row: int) -> None:
        self.member = member
        self.row = row
        self.since = 0
        self.until: int | None = None
        self.older: Version | None = None

    def seen_in(self, epoch: int) -> bool:
        return self.since <= epoch and (self.until is None or epoch < self.until)


class History:
    """The names, the rows that are free, and the leases.  Thread-safe; no method holds the lock for long."""

    def __init__(self, rows: int, base: Member) -> None:
        """``rows``: how many there are; row 0 is the base's."""
        self._lock = threading.Lock()
        self._rows = rows
        self._top = 1
        self._free: list[int] = []
        self._epoch = 0
        self._newest: dict[str, Version] = {base.name: Version(base, 0)}
        self._count = 1
        #: epoch → open leases
        self._leases: Counter[int] = Counter()
        #: what was replaced or removed and may still be seen, in that order
        self._retired: deque[Version] = deque()

    @property
    def top(self) -> int:
        """Rows from here on were never written."""
        with self._lock:
            return self._top

    @property
    def count(self) -> int:
        with self._lock:
            return self._count

    def find(self, name: str, epoch: int | None = None) -> Version | None:
        """The version of ``name`` that is seen in ``epoch``, or now."""
        with self._lock:
            return self._find(name, self._epoch if epoch is None else epoch)

    def find_all(self, names: Sequence[str], epoch: int) -> list[Version | None]:
        with self._lock:
            return [self._find(name, epoch) for name in names]

    def versions(self, epoch: int | None = None) -> list[Version]:
        """All that is seen in ``epoch``, or now; the base first, then in the order in which names were added."""
        with self._lock:
            at = self._epoch if epoch is None else epoch
            found = (self._find(name, at) for name in self._newest)
            return [version for version in found if version is not None]

    def open(self) -> tuple[int, int]:
        """Begin a lease: its epoch, and how many rows it needs to see."""
        with self._lock:
            self._leases[self._epoch] += 1
            return self._epoch, self._top

    def close(self, epoch: int) -> list[int]:
        """End a lease.  Returns rows that nobody sees any more: the caller clears them and calls ``give_back``."""
        with self._lock:
            self._leases[epoch] -= 1
            if not self._leases[epoch]:
                del self._leases[epoch]
            return self._released()

    def take(self) -> int:
        """A row that nobody sees; raises ``InputError`` if there is none left."""
        with self._lock:
            if self._free:
                return heapq.heappop(self._free)
            if self._top == self._rows:
                raise InputError(
                    f"all {self._rows} rows of the table are in use, {len(self._retired)} of them by what was replaced "
                    f"or removed and {self._leases.total()} open leases may still read; close leases after each "
                    "inference, or make the table with a larger max_adapters"
                )
            self._top += 1
            return self._top - 1

    def give_back(self, rows: Sequence[int]) -> None:
        """Make ``rows`` free again, once their numbers are gone."""
        with self._lock:
            for row in rows:
                heapq.heappush(self._free, row)

    def add(self, fresh: Sequence[Version]) -> None:
        """Publish new names, all in one epoch; raises ``InputError`` if one is there already."""
        with self._lock:
            for version in fresh:
                if self._find(version.member.name, self._epoch) is not None:
                    raise InputError(f"adapter '{version.member.name}' is in the table already; replace it instead")
            self._epoch += 1
            for version in fresh:
                version.since = self._epoch
                # a removed one that somebody still sees must not keep the name's old place in the order
                version.older = self._newest.pop(version.member.name, None)
                self._newest[version.member.name] = version
            self._count += len(fresh)

    def replace(self, fresh: Version) -> list[int]:
        """Give the name of ``fresh`` its row.  Returns what ``close`` returns."""
        with self._lock:
            old = self._find(fresh.member.name, self._epoch)
            assert old is not None
            self._epoch += 1
            fresh.since, fresh.older = self._epoch, old
            self._newest[fresh.member.name] = fresh
            self._retire(old)
            return self._released()

    def remove(self, name: str) -> list[int]:
        """Take ``name`` away.  Returns what ``close`` returns."""
        with self._lock:
            old = self._find(name, self._epoch)
            assert old is not None
            self._epoch += 1
            self._count -= 1
            self._retire(old)
            return self._released()

    def _find(self, name: str, epoch: int) -> Version | None:
        version = self._newest.get(name)
        while version is not None and not version.seen_in(epoch):
            version = version.older
        return version

    def _retire(self, version: Version) -> None:
        version.until = self._epoch
        self._retired.append(version)

    def _released(self) -> list[int]:
        """Forget the versions that no lease sees: those that ended before, or when, the oldest lease began."""
        oldest = min(self._leases, default=self._epoch)
        rows = []
        while self._retired and (self._retired[0].until or 0) <= oldest:
            version = self._retired.popleft()
            self._forget(version)
            rows.append(version.row)
        return rows

    def _forget(self, version: Version) -> None:
        """Cut ``version`` off; it is the oldest of its name, because older ones ended earlier."""
        newer = self._newest[version.member.name]
        if newer is version:
            del self._newest[version.member.name]
            return
        while newer.older is not version:
            assert newer.older is not None
            newer = newer.older
        newer.older = None
