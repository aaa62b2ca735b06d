"""A server that is killed, at any moment, begins again with the old adapters or with the new ones, whole."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployfa.serving.adapter_store import AdapterStore
from deployfa.serving.adapters import AdapterRegistry

from .marked import SUFFIX, content, make_registry, state

CHILD = Path(__file__).with_name("killed_server.py")


class Killed(BaseException):
    """Nothing can be written from here on."""


class Disk:
    """Stops at its ``last`` write; what would clean up after that does nothing either, as after a kill."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int) -> None:
        self.left = last
        for owner, name in ((os, "replace"), (os, "unlink"), (os, "fsync"), (io, "open")):
            patch.setattr(owner, name, self.guarded(getattr(owner, name)))

    @property
    def dead(self) -> bool:
        return self.left < 0

    def guarded(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*given: Any, **named: Any) -> Any:
            if act.__name__ != "open" or "w" in str(given[1:2]):
                self.left -= 1
                if self.dead:
                    raise Killed
            return act(*given, **named)

        return guarded


def opened(folder: Path) -> tuple[AdapterRegistry, AdapterStore]:
    store = AdapterStore(folder)
    registry = make_registry(store, max_resident=2)
    assert registry.restore() == [] and store.odd() == []
    return registry, store


def at(folder: Path) -> dict[str, int]:
    registry, store = opened(folder)
    found = state(registry)
    store.close()
    return found


Change = Callable[[AdapterRegistry], object]
#: What is there before: a 1, own-a replaced by 1, own-b removed.
CHANGES: dict[str, Change] = {
    "a new one": lambda registry: registry.load("b", content("b", 1), SUFFIX),
    "a replacement": lambda registry: registry.load("a", content("a", 2), SUFFIX),
    "another replacement of the bundle's own": lambda registry: registry.load("own-a", content("own-a", 2), SUFFIX),
    "the bundle's own that was removed": lambda registry: registry.load("own-b", content("own-b", 2), SUFFIX),
    "an unload": lambda registry: registry.unload("a"),
    "an unload of the bundle's own that was replaced": lambda registry: registry.unload("own-a"),
}


@pytest.fixture
def before(tmp_path: Path) -> Path:
    registry, store = opened(tmp_path / "before")
    registry.load("a", content("a", 1), SUFFIX)
    registry.load("own-a", content("own-a", 1), SUFFIX)
    registry.unload("own-b")
    store.close()
    return tmp_path / "before"


def outcomes(before: Path, change: Change) -> list[dict[str, int]]:
    """What a restart finds after a kill at the first write, at the second, and so on; the last one was not killed."""
    found = []
    for last in range(100):
        folder = before.parent / f"killed-{last}"
        shutil.copytree(before, folder)
        registry, store = opened(folder)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, last)
            with contextlib.suppress(Killed):
                change(registry)
        store.close()
        found.append(at(folder))
        assert at(folder) == found[-1], "a second restart finds something else"
        assert not list((folder / ".incoming").iterdir())
        if not disk.dead:
            return found
    raise AssertionError("it never ends")


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_kill_leaves_the_old_or_the_new(before: Path, change: Change) -> None:
    old = at(before)
    assert old == {"a": 1, "own-a": 1}
    found = outcomes(before, change)
    assert found[0] == old and found[-1] != old and len(found) >= 3
    switch = found.index(found[-1])
    assert found == [old] * switch + [found[-1]] * (len(found) - switch)


def test_a_kill_between_two_files_of_one_name(tmp_path: Path) -> None:
    """A file of another kind takes the name over."""
    for last in range(10):
        store = AdapterStore(tmp_path / str(last))
        store.put("a", b"old", ".pt")
        os.utime(store.folder / "a.pt", (1, 1))
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, last)
            with contextlib.suppress(Killed):
                store.put("a", b"new", SUFFIX)
        store.close()
        store = AdapterStore(tmp_path / str(last))
        (file,) = (path for path in store.folder.iterdir() if not path.name.startswith("."))
        assert store.names() == ["a"] and store.file("a") == file
        assert file.read_bytes() == (b"new" if file.suffix == SUFFIX else b"old")
        store.close()
        if not disk.dead:
            assert file.suffix == SUFFIX
            return
    raise AssertionError("it never ends")


def removed_before_marked(self: AdapterStore, name: str, *, mark: bool = False) -> None:
    file = self._files.pop(name, None)
    if file is not None:
        file.unlink()
    if mark:
        self._tombstone(name).open("wb").close()


def emptied_before_filled(self: AdapterStore, name: str, aside: Path, suffix: str) -> None:
    target = self._folder / f"{name}{suffix}"
    target.unlink(missing_ok=True)
    os.replace(aside, target)


def written_in_place(self: AdapterStore, name: str, aside: Path, suffix: str) -> None:
    with (self._folder / f"{name}{suffix}").open("wb") as stream:
        stream.write(aside.read_bytes()[:-100])
        os.fsync(stream.fileno())
        stream.write(aside.read_bytes()[-100:])


@pytest.mark.parametrize(
    ("method", "fault", "change"),
    [
        ("remove", removed_before_marked, "an unload of the bundle's own that was replaced"),
        ("_commit", emptied_before_filled, "a replacement"),
        ("_commit", written_in_place, "a new one"),
    ],
    ids=["removes before it marks", "empties before it fills", "writes in place"],
)
def test_a_worse_order_is_noticed(
    before: Path, monkeypatch: pytest.MonkeyPatch, method: str, fault: Callable[..., None], change: str
) -> None:
    monkeypatch.setattr(AdapterStore, method, fault)
    with pytest.raises(AssertionError):
        test_a_kill_leaves_the_old_or_the_new(before, CHANGES[change])


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(seed: int) -> subprocess.Popen[str]:
        command = [sys.executable, str(CHILD), str(tmp_path / "state"), str(seed)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_real_kill(tmp_path: Path, child: Callable[[int], subprocess.Popen[str]]) -> None:
    """A process that changes its adapters as fast as it can, killed in the midst of it, five times over."""
    rng, known = random.Random(0), {"own-a": 0, "own-b": 0}
    for number in range(5):
        process = child(number)
        assert process.stdout is not None
        begun: tuple[str, int] | None = None
        lines = 0
        wanted = rng.randrange(3, 60)
        for line in process.stdout:
            what, name, text = line.split()
            if what == "begin":
                begun = name, int(text)
            else:
                assert begun is not None
                known = changed(known, *begun)
                begun = None
            lines += 1
            if lines == wanted:
                process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL and lines >= wanted
        found = at(tmp_path / "state")
        assert found in ([known] if begun is None else [known, changed(known, *begun)])
        known = found


def changed(known: dict[str, int], name: str, number: int) -> dict[str, int]:
    """``number`` -1: unloaded."""
    rest = {each: version for each, version in known.items() if each != name}
    return rest if number < 0 else rest | {name: number}
