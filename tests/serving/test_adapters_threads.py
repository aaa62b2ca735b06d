"""Threads that load, replace, unload and evict while others take: everybody gets the right row, whole, and keeps it.

A version says which load a row is of, so a row of another adapter, a torn one, one that changes while it is held and
one that was replaced before it was asked for all show.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployfa.errors import InputError
from deployfa.serving.adapter_store import AdapterStore
from deployfa.serving.adapters import AdapterRegistry
from deployfa.serving.catalogue import Entry
from deployfa.serving.holders import TableHolder
from deployfa.serving.taken import TakenRow
from deployfa.serving.turns import Turns

from .marked import OWN, SUFFIX, VERSIONS, content, make_registry, mark, owner_of

#: Never unloaded, only replaced; the others come and go.
KEPT = ("a", "b", "own-a")
NAMES = (*KEPT, "c", "d", "own-b")


@pytest.fixture(autouse=True)
def short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[AdapterRegistry]:
    store = AdapterStore(tmp_path / "state")
    yield make_registry(store, max_resident=2)
    store.close()


class Hammer:
    """Two threads that change, each its own half of the names, and three that take."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.registry = registry
        self.wrong: list[str] = []
        self.taken = self.fetched = self.changes = 0
        #: name → the newest version that was loaded for sure
        self.loaded = dict.fromkeys(NAMES, 0)
        self.counting = threading.Lock()

    def run(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        for name in KEPT[:2]:
            self.registry.load(name, content(name, 0), SUFFIX)
        threads = [threading.Thread(target=self.guarded, args=(self.change, n), daemon=True) for n in range(2)]
        threads += [threading.Thread(target=self.guarded, args=(self.take, n), daemon=True) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 60)
            assert not thread.is_alive(), "a thread hangs"

    def running(self) -> bool:
        return time.monotonic() < self.end and not self.wrong

    def guarded(self, body: Callable[[random.Random, int], None], number: int) -> None:
        rng = random.Random(number)
        try:
            while self.running():
                body(rng, number)
        except BaseException as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def change(self, rng: random.Random, number: int) -> None:
        name = rng.choice(NAMES[number::2])
        here = name in self.registry
        if here and name not in KEPT and rng.random() < 0.4:
            self.registry.unload(name)
        else:
            version = self.loaded[name] + 1
            self.registry.load(name, content(name, version), SUFFIX)
            self.loaded[name] = version
        self.changes += 1

    def take(self, rng: random.Random, number: int) -> None:
        name = rng.choice(NAMES)
        least = self.loaded[name]
        try:
            taken = self.registry.take(name)
            if taken is None:
                taken = self.registry.fetch(name)
                self.fetched += 1
        except InputError as error:
            if name in KEPT or "no adapter" not in str(error):
                raise
            return
        first = mark(taken)
        time.sleep(rng.choice([0, 0, 1e-3]))
        if mark(taken) != first:
            self.wrong.append(f"{name}: {first} became {mark(taken)} while it was held")
        if taken.name != name or first // VERSIONS != owner_of(name) or taken.labels != (name, "x"):
            self.wrong.append(f"{name}: the row of another one {first} {taken.labels}")
        elif first % VERSIONS < least:
            self.wrong.append(f"{name}: an old version {first % VERSIONS}, {least} was loaded")
        taken.close()
        taken.close()
        with self.counting:
            self.taken += 1


def test_everybody_gets_the_right_row(registry: AdapterRegistry) -> None:
    hammer = Hammer(registry)
    hammer.run(4.0)
    assert not hammer.wrong
    assert hammer.taken > 100 and hammer.fetched > 10 and hammer.changes > 50
    counters = registry.counters
    assert counters["evictions"] > 10 and counters["replacements"] > 10
    # nothing is left: no turn, no row, no lease
    assert len(registry._turns) == 0
    here = [info for info in registry.list() if info.resident]
    assert sum(not info.pinned for info in here) <= 2
    table: Any = registry._holder._table  # type: ignore[attr-defined]
    assert set(table.names()) == {info.name for info in here}
    assert not table._history._leases and not table._history._retired
    assert {"base", *KEPT[:2], OWN[0]} <= {info.name for info in registry.list()}


def row_looked_up_before_the_lease(self: TableHolder, name: str) -> TakenRow | None:
    try:
        row, labels = self._table.row(name), self._table.labels(name)
    except InputError:
        return None
    time.sleep(0)
    return TakenRow(name, labels, row, self._table.snapshot())


taking = TableHolder.take


class OpenTaken(TakenRow):
    """Without slots, so that a fault can replace its methods."""


def lease_of_nobody(self: TableHolder, name: str) -> TakenRow | None:
    taken = taking(self, name)
    if taken is None or taken.lease is None:
        return None
    found = OpenTaken(taken.name, taken.labels, taken.row, taken.lease)
    taken.lease.close()
    taken.lease._closed = False
    found.close = lambda: setattr(taken.lease, "_closed", True)  # type: ignore[method-assign]
    return found


@contextlib.contextmanager
def no_turns(self: Turns, name: str) -> Iterator[None]:
    yield


def not_kept(self: AdapterStore, name: str, aside: Path, suffix: str) -> None:
    """It counts, but the file is the first one."""
    self._files.setdefault(name, self._folder / f"{name}{suffix}")
    if not self._files[name].exists():
        aside.rename(self._files[name])


def forgotten_before_it_leaves(self: AdapterRegistry, entry: Entry, *, forget: bool = False) -> None:
    if forget:
        del self._catalogue._entries[entry.name]
    time.sleep(0)
    with self._placing:
        if self._catalogue.left(entry):
            self._holder.drop(entry.name)


@pytest.mark.parametrize(
    ("owner", "method", "fault", "sign"),
    [
        (TableHolder, "take", row_looked_up_before_the_lease, "another one|a torn row|while it was held|old version"),
        (TableHolder, "take", lease_of_nobody, "another one|a torn row|while it was held|old version"),
        (Turns, "of", no_turns, "old version|Error"),
        (AdapterStore, "_commit", not_kept, "old version"),
        (AdapterRegistry, "_leave", forgotten_before_it_leaves, "KeyError"),
    ],
    ids=[
        "looks a row up before its lease",
        "holds no lease",
        "changes one name twice at a time",
        "keeps the old file",
        "forgets in two steps",
    ],
)
def test_a_fault_is_noticed(
    registry: AdapterRegistry,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    fault: Callable[..., object],
    sign: str,
) -> None:
    monkeypatch.setattr(owner, method, fault)
    hammer = Hammer(registry)
    hammer.run(20.0)
    assert any(re.search(sign, text) for text in hammer.wrong), hammer.wrong
