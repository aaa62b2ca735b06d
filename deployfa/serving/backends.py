"""What runs a batch: a bundle's one adapter, a pack in which every row has its own, or slots, one adapter a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np

from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_bundle, open_slots
from deployfa.edits import Array
from deployfa.errors import RequestError
from deployfa.mixed import MixedRunner, open_table
from deployfa.runtimes.runner import Runner, Spinning, TensorSpec
from deployfa.runtimes.slots import SlotRunner
from deployfa.serving.taken import Taken, TakenRow, TakenSlot
from deployfa.serving.work import Work
from deployfa.tables import AdapterTable

__all__ = ["Backend", "FixedBackend", "PackBackend", "SlotBackend", "open_backend"]


class Backend(Protocol):
    """``run`` is called from one thread at a time."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def group(self, taken: Taken, strength: float | None) -> Hashable:
        """Only requests of one group can share a batch."""
        ...

    def run(self, feeds: Mapping[str, Array], works: Sequence[Work]) -> dict[str, Array]:
        """One inference; ``works`` say whose rows are whose, in order."""
        ...


class FixedBackend:
    """The one adapter that is folded in, or laid beside."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.inputs = runner.inputs
        self.outputs = runner.outputs

    def group(self, taken: Taken, strength: float | None) -> Hashable:
        if strength is not None:
            raise RequestError("the bundle's adapter has its strength in it; leave out 'strength', or serve a pack")
        return None

    def run(self, feeds: Mapping[str, Array], works: Sequence[Work]) -> dict[str, Array]:
        return self._runner.run(feeds)


class PackBackend:
    """Requests for different adapters ride in one batch.  ``table``: ``None`` where adapters never change."""

    def __init__(self, runner: MixedRunner, table: AdapterTable | None) -> None:
        self._runner = runner
        self.table = table
        self.inputs = runner.inputs
        self.outputs = runner.outputs

    def group(self, taken: Taken, strength: float | None) -> Hashable:
        return None

    def run(self, feeds: Mapping[str, Array], works: Sequence[Work]) -> dict[str, Array]:
        taken = [work.taken for work in works]
        counts = [work.rows for work in works]
        rows = np.repeat(np.array([each.row for each in taken if isinstance(each, TakenRow)], np.int64), counts)
        strength = None
        if any(work.strength is not None for work in works):
            strengths = [1.0 if work.strength is None else work.strength for work in works]
            strength = np.repeat(np.array(strengths, np.float32), counts)
        leases = [each.lease for each in taken if isinstance(each, TakenRow) and each.lease is not None]
        # a table only grows: the newest of its views holds the rows of all leases that are open
        newest = max(leases, key=lambda lease: lease.epoch) if leases else None
        return self._runner.run_rows(feeds, rows, strength=strength, lease=newest)


class SlotBackend:
    """One adapter a batch, another one in the next."""

    def __init__(self, runner: SlotRunner) -> None:
        self.runner = runner
        self.inputs = runner.inputs
        self.outputs = runner.outputs

    def group(self, taken: Taken, strength: float | None) -> Hashable:
        assert isinstance(taken, TakenSlot)
        if taken.adapter is None and strength is not None:
            raise RequestError("a strength is for an adapter, not for the base; leave 'strength' out")
        return id(taken.adapter), strength

    def run(self, feeds: Mapping[str, Array], works: Sequence[Work]) -> dict[str, Array]:
        taken = works[0].taken
        assert isinstance(taken, TakenSlot)
        return self.runner.run(feeds, taken.adapter, strength=works[0].strength)


def open_backend(
    bundle: Bundle,
    *,
    target: str | None,
    engine: str | None,
    threads: int | None,
    spinning: Spinning,
    max_adapters: int | None,
) -> Backend:
    """``max_adapters``: how many a table that can change has room for, those of the pack among them."""
    target = target or bundle.manifest.target
    tables = bundle.manifest.tables
    if bundle.manifest.slots is not None:
        return SlotBackend(open_slots(bundle, target=target, engine=engine, threads=threads, spinning=spinning))
    if tables is not None:
        table = open_table(bundle, max_adapters=max_adapters) if tables.inputs else None
        return PackBackend(
            MixedRunner(bundle, table, target=target, engine=engine, threads=threads, spinning=spinning), table
        )
    return FixedBackend(open_bundle(bundle, target, engine=engine, threads=threads, spinning=spinning))
