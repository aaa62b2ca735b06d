"""The table against a plain dict: any sequence of changes, failures and leases gives what the dict gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deployfa.adapter import Adapter
from deployfa.edits import Array, Edit
from deployfa.errors import EditError, InputError
from deployfa.tables import AdapterTable, Lease, base_row, row_of
from deployfa.tables.history import History

from .tiny import BASE_LABELS, HEAD, METHODS, base_head, make_adapter, make_layout

Row = dict[str, Array]
LAYOUT = make_layout()
BASE = base_row(LAYOUT, {HEAD: base_head()})
NAMES = st.sampled_from("abcdefgh")
ADAPTERS = st.tuples(st.sampled_from(METHODS), st.integers(0, 7))
BAD = make_adapter("vefa", edits={"q": Edit(lam=np.full(5, np.nan))})
Kind = tuple[str, int]


@cache
def made(kind: Kind) -> tuple[Adapter, Row]:
    adapter = make_adapter(*kind)
    return adapter, row_of(adapter, LAYOUT, BASE)


def wanted(kind: Kind | None) -> Row:
    return BASE if kind is None else made(kind)[1]


class TableAndDict(RuleBasedStateMachine):
    """``model``: name → the method and seed of its adapter; every lease comes with a copy of it."""

    @initialize()
    def begin(self) -> None:
        self.table = AdapterTable(LAYOUT, BASE, labels=BASE_LABELS, max_adapters=6)
        self.model: dict[str, Kind | None] = {"base": None}
        self.leases: list[tuple[Lease, dict[str, Kind | None]]] = []

    def full(self, more: int = 1) -> bool:
        return len(self.model) - 1 + more > 6

    @rule(name=NAMES, kind=ADAPTERS)
    def add(self, name: str, kind: Kind) -> None:
        if name in self.model or self.full():
            with pytest.raises(InputError, match=r"already; replace it|table is full with 6"):
                self.table.add(name, made(kind)[0])
        elif self.rows_left():
            assert self.table.add(name, made(kind)[0]) == self.table.row(name)
            self.model[name] = kind

    @rule(kinds=st.dictionaries(NAMES, ADAPTERS, max_size=4), bad=st.booleans())
    def add_many(self, kinds: dict[str, Kind], bad: bool) -> None:
        pairs = [(name, made(kind)[0]) for name, kind in kinds.items()] + ([("bad", BAD)] if bad else [])
        if self.rows_left() < len(pairs):
            return
        if bad or self.full(len(kinds)) or kinds.keys() & self.model.keys():
            if pairs and (bad or kinds):
                with pytest.raises((InputError, EditError)):
                    self.table.add_many(pairs)
            return
        self.table.add_many(pairs)
        self.model |= kinds

    @rule(name=NAMES, kind=ADAPTERS)
    def replace(self, name: str, kind: Kind) -> None:
        if name not in self.model:
            with pytest.raises(InputError, match="is not in the table"):
                self.table.replace(name, made(kind)[0])
        elif self.rows_left():
            self.table.replace(name, made(kind)[0])
            self.model[name] = kind

    @rule(name=NAMES)
    def replace_by_what_does_not_fit(self, name: str) -> None:
        with pytest.raises((InputError, EditError)):
            self.table.replace(name, BAD)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.model:
            self.table.remove(name)
            del self.model[name]
        else:
            with pytest.raises(InputError, match="is not in the table"):
                self.table.remove(name)

    @precondition(lambda self: len(self.leases) < 4)
    @rule()
    def open(self) -> None:
        self.leases.append((self.table.snapshot(), dict(self.model)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.leases) - 1))
        lease, model = self.leases.pop(number)
        self.check(lease, model)
        lease.close()

    def rows_left(self) -> int:
        """How many rows can be taken; a full table under open leases has a test of its own."""
        history = self.table._history
        return history._rows - history._top + len(history._free)

    @staticmethod
    def check(lease: Lease, model: dict[str, Kind | None]) -> None:
        assert set(lease.names()) == set(model)
        numbers = lease.rows(model)
        assert len(set(numbers.tolist())) == len(model)
        for number, (name, kind) in zip(numbers, model.items(), strict=True):
            for tensor, values in wanted(kind).items():
                assert lease.arrays[tensor][number].tobytes() == values.tobytes(), (name, tensor)
            labels = (made(kind)[0].labels or BASE_LABELS) if kind else BASE_LABELS
            assert lease.labels(name) == labels

    @invariant()
    def every_lease_sees_what_it_began_with(self) -> None:
        for lease, model in self.leases:
            self.check(lease, model)

    @invariant()
    def the_table_is_the_dict(self) -> None:
        assert self.table.names() == list(self.model)
        assert len(self.table) == len(self.model)
        assert {info.name: info.row for info in self.table.info()} == {
            name: self.table.row(name) for name in self.model
        }
        with self.table.snapshot() as lease:
            self.check(lease, self.model)

    def teardown(self) -> None:
        for lease, model in self.leases:
            self.check(lease, model)
            lease.close()
        with self.table.snapshot() as lease:
            owned = set(lease.rows(self.model).tolist())
            for tensor, array in lease.arrays.items():
                for number in set(range(len(array))) - owned:
                    assert array[number].tobytes() == BASE[tensor].tobytes(), "a removed adapter is still there"
        # no row is lost, none is free twice
        history = self.table._history
        assert sorted([*history._free, *owned]) == list(range(history._top))
        assert history._newest.keys() == self.model.keys() and not history._retired and not history._leases
        # and no past is kept that nobody can ask for
        assert all(version.older is None for version in history._newest.values())


def run(**options: Any) -> None:
    limits = settings(max_examples=120, stateful_step_count=30, **options)
    run_state_machine_as_test(TableAndDict, settings=limits)


def test_the_table_is_a_dict_whatever_is_done_to_it() -> None:
    run()


def released_at_once(history: History) -> list[int]:
    """A fault: rows are free as soon as their name has gone, whoever reads them."""
    versions = list(history._retired)
    history._retired.clear()
    for version in versions:
        history._forget(version)
    return [version.row for version in versions]


def given_back_as_they_are(table: AdapterTable, rows: list[int]) -> None:
    """A fault: what was removed stays where it was."""
    table._history.give_back(rows)


@pytest.mark.parametrize(
    ("owner", "method", "fault"),
    [(History, "_released", released_at_once), (AdapterTable, "_clear", given_back_as_they_are)],
    ids=["rows are reused too early", "rows are not cleared"],
)
def test_the_comparison_notices(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, fault: Any) -> None:
    monkeypatch.setattr(owner, method, fault)
    # found, not shrunk, which takes half a minute
    with pytest.raises((AssertionError, InputError)):
        run(phases=[Phase.generate], report_multiple_bugs=False)
