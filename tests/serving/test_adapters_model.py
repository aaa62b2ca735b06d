"""The registry against a plain dict: any sequence of changes, failures, evictions and restarts gives the same."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deployfa.errors import AdapterFormatError, BaseMismatchError, InputError
from deployfa.serving.adapter_store import AdapterStore
from deployfa.serving.adapters import AdapterRegistry
from deployfa.serving.catalogue import Catalogue, Entry
from deployfa.serving.taken import Taken

from .marked import OWN, SUFFIX, content, damaged, make_registry, misfit, version

MOST = 2
NAMES = st.sampled_from([*"abcd", *OWN])
VERSIONS = st.integers(1, 9)


class RegistryAndDict(RuleBasedStateMachine):
    """``model``: name → version; ``recent``: what is in memory and not the bundle's own, the least recently used first;
    ``broken``: whose file is damaged; ``lost``: the bundle's own that the last restart did not find whole."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="deployfa-test-"))
        self.model = dict.fromkeys(OWN, 0)
        self.recent: list[str] = []
        self.broken: set[str] = set()
        self.lost: set[str] = set()
        self.held: list[tuple[Taken, int]] = []
        self.clock = 1_000_000
        self.open()

    def open(self) -> None:
        self.store = AdapterStore(self.folder)
        self.registry = make_registry(self.store, MOST)
        reported = {name for name, _ in self.registry.restore()}
        # no older file is looked at than it takes to fill the memory
        self.lost = self.broken & set(OWN)
        assert self.lost <= reported <= self.broken

    def touched(self, name: str) -> None:
        if name not in OWN:
            self.recent = [*(each for each in self.recent if each != name), name][-MOST:]

    def here(self, name: str) -> bool:
        return name in self.model and (name in self.recent or (name in OWN and name not in self.lost))

    @rule(name=NAMES, number=VERSIONS)
    def load(self, name: str, number: int) -> None:
        self.registry.load(name, content(name, number), SUFFIX)
        # files of one moment are in no order
        self.clock += 1
        os.utime(self.folder / f"{name}{SUFFIX}", (self.clock, self.clock))
        self.model[name] = number
        self.broken.discard(name)
        self.lost.discard(name)
        self.touched(name)

    @rule(name=NAMES, fits=st.booleans())
    def load_what_fails(self, name: str, fits: bool) -> None:
        with pytest.raises(AdapterFormatError if fits else BaseMismatchError):
            self.registry.load(name, damaged(name) if fits else misfit(name), SUFFIX)

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(InputError, match="no adapter"):
                self.registry.unload(name)
            return
        self.registry.unload(name)
        del self.model[name]
        self.broken.discard(name)
        self.lost.discard(name)
        self.recent = [each for each in self.recent if each != name]

    @rule(name=NAMES)
    def take(self, name: str) -> None:
        if name not in self.model:
            for ask in (self.registry.take, self.registry.fetch):
                with pytest.raises(InputError, match="no adapter"):
                    ask(name)
        elif self.here(name):
            taken = self.registry.take(name)
            assert taken is not None
            self.held.append((taken, self.model[name]))
            self.touched(name)
        else:
            assert self.registry.take(name) is None
            self.fetch(name)

    def fetch(self, name: str) -> None:
        if name in self.broken:
            with pytest.raises(AdapterFormatError):
                self.registry.fetch(name)
            return
        self.held.append((self.registry.fetch(name), self.model[name]))
        self.touched(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        taken, number = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert version(taken) == number

    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        names = sorted(name for name in self.model if self.store.file(name) is not None)
        if names:
            self.spoil(data.draw(st.sampled_from(names)))

    def spoil(self, name: str) -> None:
        file = self.folder / f"{name}{SUFFIX}"
        file.write_bytes(damaged(name))
        self.clock += 1
        os.utime(file, (self.clock, self.clock))
        self.broken.add(name)

    @rule()
    def restart(self) -> None:
        while self.held:
            taken, number = self.held.pop()
            assert version(taken) == number
        self.store.close()
        self.open()
        newest = [name for name in self.store.names() if name not in OWN and name not in self.broken]
        self.recent = newest[:MOST][::-1]

    @invariant()
    def everything_is_known(self) -> None:
        listed = {info.name: info for info in self.registry.list()}
        assert listed.keys() == {"base", *self.model}
        assert sorted(self.recent) == sorted(name for name, info in listed.items() if info.resident and not info.pinned)
        assert list(self.registry._catalogue._recent) == self.recent
        assert self.lost == {name for name, info in listed.items() if info.pinned and not info.resident}
        assert self.registry.resident == len(self.recent) + len(set(OWN) & self.model.keys()) - len(self.lost)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            for taken, number in self.held:
                assert version(taken) == number
            self.store.close()
            shutil.rmtree(self.folder)


def test_any_sequence() -> None:
    run_state_machine_as_test(RegistryAndDict, settings=settings(max_examples=60, stateful_step_count=25))


def evicts_the_newest(self: Catalogue, but: str) -> str | None:
    name = next((each for each in reversed(self._recent) if each != but), None)
    if name is not None:
        del self._recent[name]
        self._entries[name].resident = False
    return name


def uses_nothing(self: Catalogue, entry: Entry) -> None:
    entry.hits += 1


def leaves_no_mark(self: AdapterStore, name: str, *, mark: bool = False) -> None:
    removing(self, name)


def restores_in_any_order(self: Catalogue, newest_first: object) -> None:
    pass


def keeps_the_bundles_own(self: AdapterRegistry, entry: Entry, *, forget: bool = False) -> None:
    if forget:
        leaving(self, entry, forget=forget)


removing = AdapterStore.remove
leaving = AdapterRegistry._leave


Machine = RegistryAndDict


def loads_three(machine: Machine) -> None:
    for name in "abc":
        machine.load(name, 1)


def uses_the_older(machine: Machine) -> None:
    machine.load("a", 1)
    machine.load("b", 1)
    machine.take("a")


def restarts_with_two(machine: Machine) -> None:
    machine.load("b", 1)
    machine.load("a", 1)
    machine.restart()


def restarts_without_its_own(machine: Machine) -> None:
    machine.unload("own-a")
    machine.restart()


def restarts_with_its_own_broken(machine: Machine) -> None:
    machine.load("own-a", 1)
    machine.spoil("own-a")
    machine.restart()


def play(steps: Callable[[Machine], None]) -> None:
    machine = RegistryAndDict()
    machine.begin()
    try:
        steps(machine)
        machine.everything_is_known()
    finally:
        machine.teardown()


@pytest.mark.parametrize(
    ("owner", "method", "fault", "steps"),
    [
        (Catalogue, "evicted", evicts_the_newest, loads_three),
        (Catalogue, "used", uses_nothing, uses_the_older),
        (Catalogue, "order", restores_in_any_order, restarts_with_two),
        (AdapterStore, "remove", leaves_no_mark, restarts_without_its_own),
        (AdapterRegistry, "_leave", keeps_the_bundles_own, restarts_with_its_own_broken),
    ],
)
def test_the_dict_notices(
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    fault: Callable[..., object],
    steps: Callable[[Machine], None],
) -> None:
    """Each fault by the shortest sequence that shows it: a random search found most of them, most of the time."""
    play(steps)
    monkeypatch.setattr(owner, method, fault)
    with pytest.raises(AssertionError):
        play(steps)
