"""Adapters by name, stacked in memory: add, replace and remove them while others run inferences.

The memory model.  A row is written whole while no name leads to it, and then its name is published under a lock that
every reader takes when it looks a name up; so a reader sees a row whole or not at all.  Nothing is ever written to a
row that an open lease can reach by name: a replacement goes into another row, and the old one is overwritten with the
base's row, and only then free for reuse, once the last lease that was opened before has been closed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployfa.adapter import Adapter
from deployfa.edits import Array
from deployfa.errors import BaseMismatchError, EditError, InputError, SiteError
from deployfa.tables.checks import BASE, check_base, check_layout, check_name
from deployfa.tables.fleet import Fleet, write_fleet
from deployfa.tables.history import History, Member, Version
from deployfa.tables.layout import Layout
from deployfa.tables.lease import Lease, unknown_name
from deployfa.tables.memory import RowMemory
from deployfa.tables.row import row_of

__all__ = ["MAX_ADAPTERS", "AdapterInfo", "AdapterTable"]

#: For how many adapters a table reserves address space if nobody says.
MAX_ADAPTERS = 65_536
#: Rows beside two for each adapter: the base's, and some for a table of few adapters that are replaced often.
_SPARE_ROWS = 64


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter of a table.  ``parameters``: trained numbers, without replaced modules; ``bytes``: of its row."""

    name: str
    row: int
    method: str
    labels: tuple[str, ...]
    parameters: int
    bytes: int


class AdapterTable:
    """Rows of one layout, by name; row 0 is the base, named ``base``.  Thread-safe.

    Changes wait for each other, never for readers, and readers never wait for the numbers of a row to be written.
    """

    def __init__(
        self,
        layout: Layout,
        base: Mapping[str, Array],
        *,
        labels: Sequence[str] = (),
        weights: Mapping[str, Callable[[], Array]] | None = None,
        max_adapters: int | None = None,
    ) -> None:
        """``base``: the row that changes nothing, see ``base_row``; ``labels``: what its answers mean; ``weights``:
        what ``row_of`` needs for some LoRFAs.

        Without ``max_adapters`` there is room for 65,536, or for as many as the system has address space.  Raises
        ``InputError`` if there is none for ``max_adapters``, and ``EditError`` if ``base`` is no row of the layout.
        """
        check_layout(layout)
        check_base(layout, base)
        if max_adapters is not None and max_adapters < 1:
            raise InputError(f"max_adapters is {max_adapters}; pass 1 or more")
        self._layout = layout
        # more than twice as many rows: one that was replaced cannot be reused while somebody reads it
        wanted = 2 * (max_adapters or MAX_ADAPTERS) + _SPARE_ROWS
        self._memory = RowMemory(layout.shapes(), wanted, (max_adapters or 1) + 2)
        self._max_adapters = max_adapters or min(MAX_ADAPTERS, max(1, (self._memory.rows - _SPARE_ROWS) // 2))
        self._memory.write(0, base)
        self._base = self._memory.row(0)
        self._base_labels = tuple(labels)
        self._weights = weights
        self._history = History(self._memory.rows, Member(name=BASE, method=BASE, labels=self._base_labels))
        # one change at a time; whoever changes the table in the midst of add_many's own iterable may do so
        self._changing = threading.RLock()

    @classmethod
    def from_fleet(
        cls,
        fleet: Fleet,
        *,
        weights: Mapping[str, Callable[[], Array]] | None = None,
        max_adapters: int | None = None,
    ) -> AdapterTable:
        """All adapters of ``fleet`` under their names; the file is read once, and not needed any more.

        ``weights``: what ``row_of`` needs for some LoRFAs that are added later.

        Raises ``AdapterFormatError`` if it holds a number that is not finite or a base that is none, and
        ``InputError`` if it was changed since it was opened or has more than ``max_adapters``.
        """
        others = len(fleet) - 1
        if max_adapters is not None and others > max_adapters:
            raise InputError(
                f"'{fleet.path}' has {others} adapters, max_adapters is {max_adapters}; pass {others} or more"
            )
        base, labels = fleet.base(), fleet.members[0].labels
        table = cls(fleet.layout, base, labels=labels, weights=weights, max_adapters=max_adapters)
        if table.max_adapters < others:
            table = cls(fleet.layout, base, labels=labels, weights=weights, max_adapters=others)
        versions = [Version(member, table._history.take()) for member in fleet.members[1:]]
        for name in base:
            # a new table's rows are taken one after the other
            fleet.read_into(name, table._memory.rows_of(name, 1, len(fleet)), first=1)
        table._history.add(versions)
        return table

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def max_adapters(self) -> int:
        return self._max_adapters

    @property
    def row_bytes(self) -> int:
        """What one adapter takes."""
        return self._memory.row_bytes

    @property
    def memory_bytes(self) -> int:
        """What the rows take that were written so far; those that wait for reuse count."""
        return self._history.top * self.row_bytes

    def add(self, name: str, adapter: Adapter, *, allow_mismatch: bool = False) -> int:
        """Put ``adapter`` into the table; returns its row.

        Raises ``InputError`` on a name that is there already or on a full table, and what ``row_of`` raises on an
        adapter that does not fit; the table is then as it was.
        """
        return self.add_many([(name, adapter)], allow_mismatch=allow_mismatch)[name]

    def add_many(
        self, adapters: Mapping[str, Adapter] | Iterable[tuple[str, Adapter]], *, allow_mismatch: bool = False
    ) -> dict[str, int]:
        """Put all of ``adapters`` into the table at one moment, or none of them; returns name → row.

        They are taken one after the other, so an iterator need not hold them all.  Raises as ``add`` does.
        """
        pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
        fresh: dict[str, Version] = {}
        with self._changing, self._taking() as taken:
            for name, adapter in pairs:
                check_name(name)
                if name in fresh:
                    raise InputError(f"adapter '{name}' is given twice; pass each name once")
                if name in self:
                    raise InputError(f"adapter '{name}' is in the table already; replace it instead")
                if len(self) + len(fresh) > self._max_adapters:
                    raise InputError(
                        f"the table is full with {self._max_adapters} adapters; remove one, or make the table with a "
                        "larger max_adapters"
                    )
                fresh[name] = self._written(name, adapter, taken, allow_mismatch)
            self._history.add(list(fresh.values()))
        return {name: version.row for name, version in fresh.items()}

    def replace(self, name: str, adapter: Adapter, *, allow_mismatch: bool = False) -> int:
        """Give ``name`` another adapter; returns its new row.

        Leases that are open go on with the old one.  Raises ``InputError`` if there is no such name, and as ``add``.
        """
        with self._changing:
            self._changeable(name)
            with self._taking() as taken:
                fresh = self._written(name, adapter, taken, allow_mismatch)
                unseen = self._history.replace(fresh)
            self._clear(unseen)
        return fresh.row

    def remove(self, name: str) -> None:
        """Take ``name`` away; leases that are open still see it.  Raises ``InputError`` if there is no such name."""
        with self._changing:
            self._changeable(name)
            unseen = self._history.remove(name)
            self._clear(unseen)

    def snapshot(self) -> Lease:
        """The table as it is now, for one inference; close it after that, see ``Lease``."""
        epoch, rows = self._history.open()
        return Lease(self._history, epoch, self._memory.views(rows), self._clear)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the table as it is now into one file, see ``open_fleet``; whole or not at all, and without free rows.

        Raises ``OutputExistsError`` unless ``force``.
        """
        with self.snapshot() as lease:
            arrays, versions = lease.arrays, lease.versions()
            rows = ({name: array[version.row] for name, array in arrays.items()} for version in versions)
            write_fleet(Path(path), self._layout, [version.member for version in versions], rows, force=force)

    def names(self) -> list[str]:
        """All names, the base's first, then in the order in which they were added."""
        return [version.member.name for version in self._history.versions()]

    def row(self, name: str) -> int:
        """The row that ``name`` has now; an inference takes its rows from its own ``snapshot``."""
        return self._known(name).row

    def labels(self, name: str) -> tuple[str, ...]:
        """What the answers of ``name`` mean: its own labels, the base's if it has the base's head."""
        return self._known(name).member.labels

    def info(self) -> list[AdapterInfo]:
        """All adapters, in the order of ``names``."""
        size = self.row_bytes
        found = ((version.row, version.member) for version in self._history.versions())
        return [AdapterInfo(m.name, row, m.method, m.labels, m.parameters, size) for row, m in found]

    def __len__(self) -> int:
        """How many names there are, the base's included."""
        return self._history.count

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._history.find(name) is not None

    def _known(self, name: str) -> Version:
        version = self._history.find(name) if isinstance(name, str) else None
        if version is None:
            raise unknown_name(name, self.names())
        return version

    def _changeable(self, name: str) -> None:
        self._known(name)
        check_name(name)

    def _written(self, name: str, adapter: Adapter, taken: list[Version], allow_mismatch: bool) -> Version:
        """The row of ``adapter``, written where nobody sees it; it is in ``taken`` then."""
        try:
            values = row_of(adapter, self._layout, self._base, weights=self._weights, allow_mismatch=allow_mismatch)
        except (BaseMismatchError, EditError, SiteError) as error:
            raise type(error)(f"adapter '{name}': {error}") from error
        labels = adapter.labels or (() if adapter.modules else self._base_labels)
        member = Member(name=name, method=adapter.method, labels=tuple(labels), parameters=adapter.parameters)
        version = Version(member, self._history.take())
        taken.append(version)
        self._memory.write(version.row, values)
        return version

    @contextlib.contextmanager
    def _taking(self) -> Iterator[list[Version]]:
        """Rows that are taken within are free again if they were not published in the end."""
        taken: list[Version] = []
        try:
            yield taken
        finally:
            self._clear([version.row for version in taken if not version.since])

    def _clear(self, rows: Sequence[int]) -> None:
        """Overwrite rows that nobody sees with the base's, then let them be reused.

        A number that somebody kept from an old lease then means the base, until the row has a new owner.
        """
        for row in rows:
            self._memory.write(row, self._base)
        self._history.give_back(rows)
