"""Run a pack: every row of a batch with the adapter that its name says, from tables that may change meanwhile."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_engine
from deployfa.edits import Array
from deployfa.errors import InputError, RuntimeTargetError
from deployfa.graph.row_ops import ADAPTER_IDS, STRENGTH
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.runner import Spinning, TensorSpec
from deployfa.runtimes.targets import is_engine, open_onnxruntime
from deployfa.runtimes.tensorrt.runner import EngineRunner
from deployfa.tables import AdapterTable, Lease, open_fleet

__all__ = ["MixedRunner", "open_table"]


def open_table(bundle: Bundle, *, max_adapters: int | None = None) -> AdapterTable:
    """The adapters of a pack with ``--table-inputs``, in memory, to be added to, replaced and removed.

    Raises ``InputError`` for any other bundle.
    """
    tables = bundle.manifest.tables
    if tables is None or not tables.inputs:
        raise InputError(f"'{bundle.path}' keeps its adapters in the graph; pack it with --table-inputs to change them")
    return AdapterTable.from_fleet(open_fleet(bundle.path / (tables.file or "")), max_adapters=max_adapters)


class MixedRunner:
    """One session of a pack.  Thread-safe: which adapters run is an argument of the call.

    table: where the adapters are, for a pack with its tables as inputs; by default the bundle's own file, read by
    memory map.  What is added to or taken from ``table`` is there, or gone, at the next call.  target: of
    ``deployfa.runtimes.targets``, by default the bundle's own; engine: which one, where a bundle has several for it.
    """

    def __init__(
        self,
        bundle: Bundle,
        table: AdapterTable | None = None,
        *,
        target: str | None = None,
        engine: str | None = None,
        threads: int | None = None,
        spinning: Spinning = True,
    ) -> None:
        tables = bundle.manifest.tables
        if tables is None:
            raise InputError(f"'{bundle.path}' holds one adapter; make a pack with: deployfa pack")
        if table is not None and (not tables.inputs or table.layout != tables.layout):
            raise InputError(f"the table has another layout than '{bundle.path}'; make it with open_table(bundle)")
        self._table = table
        target = target or bundle.manifest.target
        self._runner: OnnxRuntimeRunner | EngineRunner
        if is_engine(target):
            if table is not None:
                raise InputError(f"a table that changes is not followed to the GPU by {target}; use onnxruntime-cuda")
            self._runner = open_engine(bundle, target, name=engine)
        else:
            bound = bundle.bound if table is None else dict(_first(table))
            self._runner = open_onnxruntime(target, bundle.graph, threads=threads, spinning=spinning, bound=bound)
        self._members = {member.name: row for row, member in enumerate(tables.adapters)}
        self._labels = {member.name: member.labels for member in tables.adapters}
        self._values: tuple[Any, dict[str, Any]] = None, {}

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` must be fed besides the names of the adapters."""
        return tuple(spec for spec in self._runner.inputs if spec.name != ADAPTER_IDS)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.outputs

    @property
    def adapters(self) -> list[str]:
        """The names that there are now, the base's first."""
        return list(self._members) if self._table is None else self._table.names()

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease | None]:
        """The adapters as they are now, for several calls that must see the same; ``None`` where they cannot change."""
        if self._table is None:
            yield None
            return
        with self._table.snapshot() as lease:
            yield lease

    def labels(self, adapter: str, lease: Lease | None = None) -> tuple[str, ...]:
        """What the answers of ``adapter`` mean, in order; empty if it does not say."""
        if lease is not None:
            return lease.labels(adapter)
        if self._table is not None:
            return self._table.labels(adapter)
        self._row(adapter)
        return self._labels[adapter]

    def run(
        self,
        feeds: Mapping[str, Array],
        adapters: Sequence[str],
        *,
        strength: Array | float | None = None,
        lease: Lease | None = None,
    ) -> dict[str, Array]:
        """One inference: ``adapters`` names one for each row, ``strength`` in [0, 1] is one for all or one for each.

        ``lease``: see ``lease()``; without one the adapters are those of this moment.  Answers of an adapter with fewer
        labels than another end in minus infinity.  Raises ``InputError`` on an unknown name, and what the runner raises
        on feeds that do not fit.
        """
        if self._table is None:
            rows = np.array([self._row(name) for name in adapters], np.int64)
            return self.run_rows(feeds, rows, strength=strength)
        if lease is None:
            with self._table.snapshot() as now:
                return self.run(feeds, adapters, strength=strength, lease=now)
        return self.run_rows(feeds, lease.rows(adapters), strength=strength, lease=lease)

    def run_rows(
        self,
        feeds: Mapping[str, Array],
        rows: Array,
        *,
        strength: Array | float | None = None,
        lease: Lease | None = None,
    ) -> dict[str, Array]:
        """``run`` for who has looked the rows up already: ``rows``, (batch,) int64, is what ``adapter_ids`` takes.

        ``lease``: an open one in which all of them are valid, or the newest of several; for tables that can change.
        """
        wanted = dict(feeds)
        if strength is not None:
            wanted[STRENGTH] = _strengths(strength, len(rows))
        wanted[ADAPTER_IDS] = rows
        if self._table is None:
            return self._runner.run(wanted)
        if lease is None:
            raise InputError("the rows of a table that changes are valid within a lease only; pass lease=")
        return self._runner.run(wanted, self._bound(lease))

    def rows(self, adapters: Sequence[str], lease: Lease | None = None) -> Array:
        """(len(adapters),) int64, what ``run_rows`` and ``run_values`` take; ``lease``: see ``lease()``.

        Raises ``InputError`` on an unknown name.
        """
        if lease is not None:
            return lease.rows(adapters)
        return np.array([self._row(name) for name in adapters], np.int64)

    def values(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """``arrays`` as the runtime's own values, for ``run_values``."""
        return self._runner.values(arrays)

    def run_values(
        self,
        values: Mapping[str, Any],
        rows: Array,
        *,
        strength: Array | float | None = None,
        lease: Lease | None = None,
    ) -> dict[str, Any]:
        """``run_rows`` with the runtime's own values in and out, as ``OnnxRuntimeRunner.run_values``."""
        if isinstance(self._runner, EngineRunner):
            raise RuntimeTargetError("an engine hands no values on; pick the target onnxruntime-cpu")
        if self._table is not None and lease is None:
            raise InputError("the rows of a table that changes are valid within a lease only; pass lease=")
        own: dict[str, Array] = {ADAPTER_IDS: rows}
        if strength is not None:
            own[STRENGTH] = _strengths(strength, len(rows))
        bound = None if lease is None else self._bound(lease)
        return self._runner.run_values({**values, **self._runner.values(own)}, bound)

    def _row(self, name: str) -> int:
        row = self._members.get(name)
        if row is None:
            near = difflib.get_close_matches(name, list(self._members), n=4) or list(self._members)[:6]
            more = f" and {len(self._members) - len(near)} more" if len(self._members) > len(near) else ""
            raise InputError(f"no adapter '{name}' in this pack; there are: {', '.join(near)}{more}")
        return row

    def _bound(self, lease: Lease) -> dict[str, Any]:
        """The lease's arrays as the runtime's values; the same ones until the table grows."""
        known, values = self._values
        if known is not lease.arrays:
            values = self._runner.values(lease.arrays)
            self._values = lease.arrays, values
        return values


def _first(table: AdapterTable) -> Mapping[str, Array]:
    with table.snapshot() as lease:
        return lease.arrays


def _strengths(strength: Array | float, rows: int) -> Array:
    values = np.atleast_1d(np.asarray(strength, np.float32))
    if values.shape not in {(1,), (rows,)}:
        raise InputError(f"{values.size} strengths for {rows} rows; pass one for all, or one for each")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise InputError("a strength is not between 0, the base, and 1, the whole adapter; pass such as 0.5")
    return values
