"""What has the adapters of a served model in memory: a table, slots, or a graph with its adapters baked in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.bundle.slots import slots_of
from deployfa.edits import Array
from deployfa.errors import InputError
from deployfa.runtimes.onnx_adapter import SUFFIX
from deployfa.runtimes.slots import SlotAdapter, SlotRunner
from deployfa.serving.taken import Taken, TakenRow, TakenSlot
from deployfa.tables import AdapterTable, Layout, Lease
from deployfa.tables.checks import BASE
from deployfa.tables.row_edits import row_edits

__all__ = ["DEFAULT", "AdapterFacts", "FixedHolder", "Holder", "Put", "SlotHolder", "TableHolder"]

#: What the adapter that a bundle with slots was exported with is called.
DEFAULT = "default"

_ADAPTER_FILES = (".safetensors", ".pt")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What is known of an adapter in memory.  ``parameters``: trained numbers, without replaced modules, ``None`` where
    the file does not say; ``bytes``: of its row."""

    method: str
    labels: tuple[str, ...]
    parameters: int | None
    bytes: int


#: Puts an adapter that was read into memory.  Its argument is called when nothing else can fail any more; if that
#: raises, the one before is back.
Put = Callable[[Callable[[], None]], AdapterFacts]


class Holder(Protocol):
    """Adapters by name, ``base`` always among them.  Thread-safe, but for two changes of one name at a time."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that can be read; none where nothing can be changed."""
        ...

    @property
    def row_bytes(self) -> int:
        """What one adapter takes."""
        ...

    @property
    def full(self) -> bool:
        """Whether an adapter must go before another one can come."""
        ...

    def held(self) -> dict[str, AdapterFacts]:
        """All adapters, the base first."""
        ...

    def names(self) -> list[str]:
        """Of all adapters, the base's first."""
        ...

    def check_changeable(self) -> None:
        """Raise ``InputError`` where adapters are neither added nor removed."""
        ...

    def take(self, name: str) -> Taken | None:
        """For one request, ``None`` if it is not there; takes microseconds, whatever changes meanwhile."""
        ...

    def prepare(self, name: str, file: Path) -> Put:
        """Read ``file``, all of it that takes long; nothing is changed before the result is called.

        Raises ``InputError`` on a file that is damaged, and either this or the result ``BaseMismatchError``,
        ``SiteError`` or ``EditError`` on an adapter that does not fit.
        """
        ...

    def put(self, name: str, file: Path) -> AdapterFacts:
        """Add or replace ``name``; raises as ``prepare``, and the one before stays."""
        ...

    def drop(self, name: str) -> None:
        """Take ``name`` away; what was taken stays as it is.  Raises ``InputError`` if it is not there."""
        ...


class TableHolder:
    """The rows of ``table``."""

    suffixes = _ADAPTER_FILES

    def __init__(self, table: AdapterTable) -> None:
        self._table = table

    @property
    def row_bytes(self) -> int:
        return self._table.row_bytes

    @property
    def full(self) -> bool:
        return len(self._table) > self._table.max_adapters

    def held(self) -> dict[str, AdapterFacts]:
        return {
            info.name: AdapterFacts(info.method, info.labels, info.parameters, info.bytes)
            for info in self._table.info()
        }

    def names(self) -> list[str]:
        return self._table.names()

    def check_changeable(self) -> None:
        pass

    def take(self, name: str) -> TakenRow | None:
        # before a lease is taken: refusing a name that there is not compares it with all that there are
        if name not in self._table:
            return None
        lease = self._table.snapshot()
        try:
            (row,) = lease.rows([name])
            return TakenRow(name, lease.labels(name), int(row), lease)
        except InputError:
            # it went between the two
            lease.close()
            return None
        except BaseException:
            lease.close()
            raise

    def prepare(self, name: str, file: Path) -> Put:
        adapter = Adapter.load(file)

        def put(commit: Callable[[], None]) -> AdapterFacts:
            # its row stays until the new one is there for good
            with self._table.snapshot() as before:
                known = name in self._table
                (self._table.replace if known else self._table.add)(name, adapter)
                try:
                    commit()
                except BaseException:
                    if known:
                        self._put_back(name, before)
                    else:
                        self._table.remove(name)
                    raise
            return AdapterFacts(adapter.method, self._table.labels(name), adapter.parameters, self.row_bytes)

        return put

    def put(self, name: str, file: Path) -> AdapterFacts:
        return self.prepare(name, file)(_nothing)

    def drop(self, name: str) -> None:
        self._table.remove(name)

    def _put_back(self, name: str, before: Lease) -> None:
        """Give ``name`` the row again that it has in ``before``."""
        (version,) = (each for each in before.versions() if each.member.name == name)
        row = {tensor: array[version.row] for tensor, array in before.arrays.items()}
        layout = self._table.layout
        member = version.member
        old = Adapter(member.method, row_edits(row, layout), modules=_heads(row, layout), labels=member.labels)
        self._table.replace(name, old, allow_mismatch=True)


class SlotHolder:
    """Adapters for the slots of ``bundle``, which ``runner`` runs; its own is called ``default``."""

    suffixes = (*_ADAPTER_FILES, SUFFIX)
    full = False

    def __init__(self, bundle: Bundle, runner: SlotRunner) -> None:
        """Raises what ``SlotRunner.load`` raises on the bundle's own adapter."""
        slots = slots_of(bundle)
        self._bundle = bundle
        self._runner = runner
        own = runner.load(bundle.path / slots.file, labels=bundle.labels)
        self.row_bytes = sum(array.nbytes for array in own.row.values())
        summary = bundle.manifest.adapter
        #: replaced whole and never changed, so that whoever takes needs no lock
        self._adapters: dict[str, tuple[SlotAdapter | None, AdapterFacts]] = {
            BASE: (None, AdapterFacts(BASE, tuple(slots.labels), 0, 0)),
            DEFAULT: (own, AdapterFacts(summary.method, own.labels, summary.parameters, self.row_bytes)),
        }

    def held(self) -> dict[str, AdapterFacts]:
        return {name: facts for name, (_, facts) in self._adapters.copy().items()}

    def names(self) -> list[str]:
        return list(self._adapters)

    def check_changeable(self) -> None:
        pass

    def take(self, name: str) -> TakenSlot | None:
        found = self._adapters.get(name)
        return None if found is None else TakenSlot(name, found[1].labels, found[0])

    def prepare(self, name: str, file: Path) -> Put:
        from deployfa.slots import slot_adapter

        adapter = slot_adapter(self._bundle, self._runner, file)
        method, parameters = SUFFIX[1:], None
        if file.suffix != SUFFIX:
            read = Adapter.load(file)
            method, parameters = read.method, read.parameters
        facts = AdapterFacts(method, adapter.labels, parameters, self.row_bytes)

        def put(commit: Callable[[], None]) -> AdapterFacts:
            commit()
            self._adapters[name] = adapter, facts
            return facts

        return put

    def put(self, name: str, file: Path) -> AdapterFacts:
        return self.prepare(name, file)(_nothing)

    def drop(self, name: str) -> None:
        if name == BASE or self._adapters.pop(name, None) is None:
            raise InputError(f"adapter '{name}' cannot be removed from the slots; pass one that is in memory")


class FixedHolder:
    """The adapters of a pack that has them in its graph, or compiled into an engine: they stay as they are."""

    suffixes = ()
    full = True

    def __init__(self, bundle: Bundle) -> None:
        tables = bundle.manifest.tables
        if tables is None:
            raise InputError(f"'{bundle.path}' holds one adapter; make a pack with: deployfa pack")
        self._path = bundle.path
        self._layout = tables.layout
        self._members = {member.name: (row, member) for row, member in enumerate(tables.adapters)}

    @property
    def row_bytes(self) -> int:
        return 4 * sum(int(np.prod(shape)) for shape in self._layout.shapes().values())

    def held(self) -> dict[str, AdapterFacts]:
        size = self.row_bytes
        return {
            name: AdapterFacts(member.method, member.labels, member.parameters, size)
            for name, (_, member) in self._members.items()
        }

    def names(self) -> list[str]:
        return list(self._members)

    def check_changeable(self) -> NoReturn:
        raise InputError(f"'{self._path}' keeps its adapters in the graph; pack it with --table-inputs to change them")

    def take(self, name: str) -> TakenRow | None:
        found = self._members.get(name)
        return None if found is None else TakenRow(name, found[1].labels, found[0])

    def prepare(self, name: str, file: Path) -> Put:
        self.check_changeable()

    def put(self, name: str, file: Path) -> AdapterFacts:
        return self.prepare(name, file)(_nothing)

    def drop(self, name: str) -> None:
        self.check_changeable()


def _heads(row: dict[str, Array], layout: Layout) -> dict[str, dict[str, Any]]:
    """The heads of a row as replaced modules: weight (d, k) and bias (d,), without the masked labels."""
    found = {}
    for head in layout.heads:
        bias = row[head.bias_name]
        kept = ~np.isneginf(bias)
        found[head.site] = {"weight": row[head.weight_name].T[kept], "bias": bias[kept]}
    return found


def _nothing() -> None:
    pass
