"""The registry: what is in memory, what waits on disk, and what a change that fails leaves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deployfa.errors import AdapterFormatError, BaseMismatchError, InputError, StorageError
from deployfa.serving.adapter_store import AdapterStore
from deployfa.serving.adapters import AdapterRegistry
from deployfa.serving.holders import FixedHolder, TableHolder
from deployfa.tables import AdapterTable

from .marked import BASE, LAYOUT, OWN, SUFFIX, content, damaged, make_registry, make_table, mark, misfit, state, version

Opener = Callable[..., AdapterRegistry]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """A registry on the folder; a second call is a restart."""
    stores: list[AdapterStore] = []

    def open_again(max_resident: int | None = None) -> AdapterRegistry:
        for store in stores:
            store.close()
        stores.append(AdapterStore(tmp_path / "state"))
        return make_registry(stores[-1], max_resident)

    yield open_again
    for store in stores:
        store.close()


def resident(registry: AdapterRegistry) -> list[str]:
    return [info.name for info in registry.list() if info.resident and not info.pinned]


def test_load_replace_unload(opened: Opener) -> None:
    registry = opened()
    info = registry.load("a", content("a", 1), SUFFIX)
    assert (info.name, info.method, info.labels, info.parameters) == ("a", "test", ("a", "x"), 40_000)
    assert (info.bytes, info.resident, info.pinned) == (4 * 40_010, True, False)
    assert (info.hits, info.loads, info.last_used) == (0, 1, None)
    old = registry.take("a")
    assert registry.load("a", content("a", 2), SUFFIX).loads == 2
    assert version(registry.take("a")) == 2
    before = time.time()
    registry.unload("a")
    assert version(old) == 1
    with pytest.raises(InputError, match=r"no adapter 'a'; there are: base, own-a, own-b"):
        registry.take("a")
    base = registry.take("base")
    assert mark(base) == 0
    (listed,) = [info for info in registry.list() if info.name == "base"]
    assert listed.hits == 1 and listed.last_used is not None and listed.last_used <= before + 60
    base.close()  # type: ignore[union-attr]
    assert [info.name for info in registry.list()] == ["base", *OWN]
    assert registry.counters == {"loads": 2, "evictions": 0, "replacements": 1, "failures": 0}
    assert registry.resident == 2 and "own-a" in registry and "a" not in registry


def test_a_file_is_as_good_as_its_bytes(opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(content("a", 7))
    registry = opened()
    registry.load("a", tmp_path / "upload", SUFFIX)
    assert version(registry.take("a")) == 7 and (tmp_path / "upload").is_file()


def test_the_one_that_was_not_used_for_the_longest_goes(opened: Opener) -> None:
    registry = opened(max_resident=2)
    for name in "abc":
        registry.load(name, content(name, 1), SUFFIX)
    assert resident(registry) == ["b", "c"]
    assert registry.take("a") is None
    assert version(registry.take("b")) == 1
    # c is the oldest now
    assert version(registry.fetch("a")) == 1
    assert resident(registry) == ["a", "b"]
    # a name that is in memory already is only used
    assert version(registry.fetch("b")) == 1
    registry.load("a", content("a", 2), SUFFIX)
    assert version(registry.fetch("c")) == 1
    assert resident(registry) == ["a", "c"] and version(registry.take("a")) == 2
    assert registry.counters["evictions"] == 3
    assert version(registry.take("own-a")) == 0, "the bundle's own are pinned"
    hits = {info.name: info.hits for info in registry.list()}
    assert hits == {"base": 0, "own-a": 1, "own-b": 0, "a": 2, "b": 2, "c": 1}


def test_what_was_fetched_is_taken_before_it_can_go(opened: Opener) -> None:
    registry = opened(max_resident=1)
    for name in "ab":
        registry.load(name, content(name, 1), SUFFIX)
    first = registry.fetch("a")
    second = registry.fetch("b")
    assert resident(registry) == ["b"] and (version(first), version(second)) == (1, 1)


def test_a_holder_that_is_full_makes_room(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "state")
    registry = AdapterRegistry(TableHolder(AdapterTable(LAYOUT, BASE, max_adapters=2)), store=store)
    for name in "abc":
        registry.load(name, content(name, 1), SUFFIX)
    assert resident(registry) == ["b", "c"] and version(registry.fetch("a")) == 1
    # a replacement needs none
    registry.load("a", content("a", 2), SUFFIX)
    assert resident(registry) == ["a", "c"]
    store.close()


def test_without_a_folder_nothing_can_go() -> None:
    registry = make_registry(None, max_resident=1)
    assert registry.restore() == []
    registry.load("a", content("a", 1), SUFFIX)
    registry.load("a", content("a", 2), SUFFIX)
    with pytest.raises(InputError, match=r"1 adapters are in memory and none .*; unload one, or serve with --state"):
        registry.load("b", content("b", 1), SUFFIX)
    assert state(registry) == {"own-a": 0, "own-b": 0, "a": 2}
    registry.unload("a")
    registry.load("b", content("b", 1), SUFFIX)
    registry.unload("own-a")
    assert state(registry) == {"own-b": 0, "b": 1}


def test_a_restart_finds_everything(opened: Opener, tmp_path: Path) -> None:
    registry = opened()
    for name in "abc":
        registry.load(name, content(name, 1), SUFFIX)
    registry.load("own-a", content("own-a", 5), SUFFIX)
    registry.unload("own-b")
    registry.unload("b")
    registry.load("a", content("a", 2), SUFFIX)
    before = state(registry)
    assert before == {"own-a": 5, "a": 2, "c": 1}
    registry = opened()
    assert registry.restore() == []
    assert state(registry) == before and registry.take("own-a").lease is not None  # type: ignore[union-attr]
    assert [info.name for info in registry.list() if info.pinned] == ["base", "own-a"]
    # one that comes back is the bundle's own again
    registry.load("own-b", content("own-b", 3), SUFFIX)
    registry = opened()
    assert registry.restore() == [] and state(registry) == before | {"own-b": 3}
    # and without its file, the bundle's version
    registry.unload("own-a")
    (tmp_path / "state" / "own-a.removed").unlink()
    registry = opened()
    assert registry.restore() == [] and state(registry)["own-a"] == 0


def test_a_restart_loads_the_newest_files_and_evicts_the_oldest_first(opened: Opener, tmp_path: Path) -> None:
    registry = opened()
    for age, name in enumerate("dbcae"):
        registry.load(name, content(name, 1), SUFFIX)
        os.utime(tmp_path / "state" / f"{name}{SUFFIX}", (1000 - age, 1000 - age))
    (tmp_path / "state" / f"d{SUFFIX}").write_bytes(damaged("d"))
    os.utime(tmp_path / "state" / f"d{SUFFIX}", (2000, 2000))
    registry = opened(max_resident=2)
    ((name, reason),) = registry.restore()
    assert name == "d" and "'d'" in reason and str(tmp_path) not in reason
    assert resident(registry) == ["b", "c"]
    unknown = [info for info in registry.list() if info.name == "e"]
    assert [(info.method, info.parameters, info.bytes) for info in unknown] == [(None, None, 4 * 40_010)]
    assert version(registry.fetch("e")) == 1
    assert resident(registry) == ["b", "e"], "c was older"


def test_a_damaged_file_harms_nobody_else(opened: Opener, tmp_path: Path) -> None:
    registry = opened(max_resident=2)
    for name in "abc":
        registry.load(name, content(name, 1), SUFFIX)
    file = tmp_path / "state" / f"a{SUFFIX}"
    for wrong, kind in ((damaged("a"), AdapterFormatError), (misfit("a"), BaseMismatchError)):
        file.write_bytes(wrong)
        for _ in range(2):
            with pytest.raises(kind) as caught:
                registry.fetch("a")
            assert str(tmp_path) not in str(caught.value)
        assert resident(registry) == ["b", "c"] and registry.counters["evictions"] == 1
    assert registry.counters["failures"] == 4
    assert registry.take("a") is None, "it is known"
    # repaired by hand, and by loading it again
    file.write_bytes(content("a", 1))
    assert version(registry.fetch("a")) == 1
    file.write_bytes(damaged("a"))
    assert version(registry.take("a")) == 1, "what is in memory does not need it"
    registry.load("a", content("a", 2), SUFFIX)
    assert version(registry.take("a")) == 2
    file.unlink()
    registry.fetch("b").close()
    registry.fetch("c").close()
    with pytest.raises(InputError, match="no adapter at 'a'"):
        registry.fetch("a")


def test_a_file_that_was_refused_is_not_read_again(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = opened(max_resident=1)
    for name in "ab":
        registry.load(name, content(name, 1), SUFFIX)
    (tmp_path / "state" / f"a{SUFFIX}").write_bytes(damaged("a"))
    read: list[str] = []
    prepare = TableHolder.prepare
    monkeypatch.setattr(TableHolder, "prepare", lambda *given: [read.append(given[1]), prepare(*given)][1])
    texts = set()
    for _ in range(3):
        with pytest.raises(AdapterFormatError) as caught:
            registry.fetch("a")
        texts.add(str(caught.value))
    assert read == ["a"] and len(texts) == 1


def test_a_bundles_own_that_was_replaced_is_not_taken_for_its_replacement(opened: Opener, tmp_path: Path) -> None:
    registry = opened()
    registry.load("own-a", content("own-a", 5), SUFFIX)
    (tmp_path / "state" / f"own-a{SUFFIX}").write_bytes(damaged("own-a"))
    registry = opened()
    assert [name for name, _ in registry.restore()] == ["own-a"]
    assert registry.take("own-a") is None
    with pytest.raises(AdapterFormatError):
        registry.fetch("own-a")
    registry.load("own-a", content("own-a", 6), SUFFIX)
    assert version(registry.take("own-a")) == 6


def test_a_stranger_in_the_folder_is_reported(opened: Opener, tmp_path: Path) -> None:
    opened()
    (tmp_path / "state" / "readme.txt").touch()
    registry = opened()
    assert [name for name, _ in registry.restore()] == ["readme.txt"]


@pytest.mark.parametrize("name", ["a", "own-a", "new"])
def test_what_fails_changes_nothing(opened: Opener, tmp_path: Path, name: str) -> None:
    registry = opened()
    registry.load("a", content("a", 1), SUFFIX)
    before, files = state(registry), sorted(os.listdir(tmp_path / "state"))
    like = "a" if name == "new" else name
    for wrong, suffix, kind in (
        (damaged(like), SUFFIX, AdapterFormatError),
        (misfit(like), SUFFIX, BaseMismatchError),
        (content(like, 2), ".pt", AdapterFormatError),
        (content(like, 2), ".onnx_adapter", InputError),
        (b"", SUFFIX, AdapterFormatError),
    ):
        with pytest.raises(kind) as caught:
            registry.load(name, wrong, suffix)
        assert str(tmp_path) not in str(caught.value)
    # the disk says no when the new one is in memory already
    target = tmp_path / "state" / f"{name}{SUFFIX}"
    kept = target.read_bytes() if target.exists() else None
    target.unlink(missing_ok=True)
    target.mkdir()
    held = registry.take("a")
    with pytest.raises(StorageError, match="cannot write"):
        registry.load(name, content(like, 2), SUFFIX)
    target.rmdir()
    if kept is not None:
        target.write_bytes(kept)
    assert version(held) == 1
    assert state(registry) == before and sorted(os.listdir(tmp_path / "state")) == files
    assert registry.counters["failures"] == 6 and registry.counters["replacements"] == 0
    registry = opened()
    assert registry.restore() == [] and state(registry) == before


def test_an_unload_that_fails_changes_nothing(opened: Opener, tmp_path: Path) -> None:
    registry = opened()
    registry.load("a", content("a", 1), SUFFIX)
    (tmp_path / "state" / "own-a.removed").mkdir()
    with pytest.raises(StorageError):
        registry.unload("own-a")
    assert state(registry) == {"own-a": 0, "own-b": 0, "a": 1}
    for name, why in (("base", "row 0"), ("", "cannot name"), ("b", r"no adapter 'b'; ")):
        with pytest.raises(InputError, match=why):
            registry.unload(name)
    assert state(registry) == {"own-a": 0, "own-b": 0, "a": 1}


def test_adapters_in_a_graph_stay(tmp_path: Path) -> None:
    from .test_holders import baked

    registry = AdapterRegistry(FixedHolder(baked()))
    assert registry.take("a").row == 1  # type: ignore[union-attr]
    for change in (lambda: registry.load("b", b"", SUFFIX), lambda: registry.unload("a")):
        with pytest.raises(InputError, match="pack it with --table-inputs"):
            change()
    assert [info.name for info in registry.list()] == ["base", "a"]


def test_names_that_are_not_there() -> None:
    registry = make_registry(None)
    with pytest.raises(InputError, match=r"^no adapter 'own_a'; nearest names: own-a, own-b$"):
        registry.take("own_a")
    with pytest.raises(InputError, match=r"^no adapter 'x{128}'; there are: base, own-a, own-b$"):
        registry.fetch("x" * 1_000_000)
    assert registry.some_names() == "base, own-a, own-b"
    with pytest.raises(InputError, match="pass 1 or more"):
        make_registry(None, max_resident=0)


def test_many_names_are_not_all_compared(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "state")
    for number in range(300):
        (tmp_path / "state" / f"tenant-{number}{SUFFIX}").touch()
    store.close()
    store = AdapterStore(tmp_path / "state")
    registry = make_registry(store, max_resident=1)
    assert len(registry.restore()) == 300
    with pytest.raises(InputError, match=r"no adapter 'tenant_7'; nearest names: tenant-7"):
        registry.take("tenant_7")
    with pytest.raises(InputError, match=r"there are: base, own-a, own-b, .* and 297 more"):
        registry.take("other")
    store.close()


def test_who_asks_for_what_is_being_loaded_waits_for_that(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests for one adapter read its file once; meanwhile another one is loaded, and taken."""
    registry = opened(max_resident=2)
    for name in "abc":
        registry.load(name, content(name, 1), SUFFIX)
    reading, go, read = threading.Event(), threading.Event(), []
    prepare = TableHolder.prepare

    def slow(self: TableHolder, name: str, file: Path) -> object:
        read.append(name)
        if name == "a":
            reading.set()
            assert go.wait(30)
        return prepare(self, name, file)

    monkeypatch.setattr(TableHolder, "prepare", slow)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(version(registry.fetch("a")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert reading.wait(30)
    assert version(registry.take("b")) == 1 and registry.take("a") is None
    registry.load("d", content("d", 1), SUFFIX)
    assert version(registry.fetch("d")) == 1
    go.set()
    for thread in threads:
        thread.join(30)
    assert found == [1] * 8 and read == ["a", "d"]


def test_a_reload_of_the_model_goes_on_with_the_same_folder(opened: Opener) -> None:
    """Two registries, the old one answering its last requests."""
    registry = opened(max_resident=1)
    for name in "ab":
        registry.load(name, content(name, 1), SUFFIX)
    registry.unload("own-a")
    fresh = AdapterRegistry(TableHolder(make_table()), store=registry._store, max_resident=1)
    assert fresh.restore() == []
    assert state(fresh) == {"own-b": 0, "a": 1, "b": 1} == state(registry)


def test_a_change_in_progress_keeps_nobody_from_taking(opened: Opener) -> None:
    """Every lock of a change is held for as long as requests take what is in memory."""
    registry = opened(max_resident=2)
    for name in "abc":
        registry.load(name, content(name, 1), SUFFIX)
    table = registry._holder._table  # type: ignore[attr-defined]
    assert registry._store is not None
    found: list[object] = []

    def take() -> None:
        found.extend([version(registry.take("b")), version(registry.take("own-a")), registry.take("a")])
        found.append(len(registry.list()))
        with pytest.raises(InputError, match="no adapter"):
            registry.take("d")

    with registry._turns.of("b"), registry._placing, table._changing, registry._store._changing:
        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(30)
    assert found == [1, 0, None, 6]
