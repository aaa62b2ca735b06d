"""Threads that change the table while others read it: a reader sees whole rows, the right ones, and the same all along.

Every number of an adapter is one mark that tells its owner and its version, so a torn row, a stranger's row and a row
that changes under a lease all show.  The marks are found in every part that an adapter can bring.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit, LowRank
from deployfa.errors import InputError
from deployfa.tables import AdapterTable, Head, Layout, LowRanks, Segment, Vectors, base_row
from deployfa.tables.history import History, Version

#: wide enough that writing a row takes longer than a thread's turn
WIDTH = 20_000
NAMES = [f"tenant-{number}" for number in range(6)]
LAYOUT = Layout(
    fingerprints=["sha256:a"],
    vectors=[
        Vectors(part="lambda", segments=[Segment(site="s", start=0, stop=WIDTH)]),
        Vectors(part="delta", segments=[Segment(site="s", start=0, stop=WIDTH)]),
    ],
    low_ranks=[LowRanks(where="input", sites=["s"], in_features=WIDTH, rank=1, widths=[WIDTH])],
    heads=[Head(site="head", in_features=4, out_features=2)],
)
MARKED = ("adapter/lambda", "adapter/delta", "adapter/s/A", "adapter/s/B", "adapter/head/weight", "adapter/head/bias")


@pytest.fixture(autouse=True)
def short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def marked(owner: int, version: int) -> Adapter:
    """Every number of its row is ``1000 owner + version``, which float32 holds exactly."""
    mark = np.float32(1000 * owner + version % 1000)
    low = LowRank(np.full((1, WIDTH), mark), np.full((WIDTH, 1), mark), 1.0)
    edit = Edit(lam=np.full(WIDTH, mark), delta=np.full(WIDTH, mark), input_low_rank=low)
    head = {"weight": np.full((2, 4), mark), "bias": np.full(2, mark)}
    return Adapter("test", {"s": edit}, {"head": head}, BaseReference(fingerprint="sha256:a"), labels=(f"{owner}", "x"))


def hammer(table: AdapterTable, seconds: float) -> tuple[list[str], int, int]:
    """Four threads, two that change and two that read, for so many seconds or until something is wrong.

    Returns what was wrong, how many leases were checked, and how many changes were made.
    """
    wrong: list[str] = []
    checked, changed = [0, 0], [0, 0]
    end = time.monotonic() + seconds
    start = threading.Barrier(4)

    def running() -> bool:
        return time.monotonic() < end and not wrong

    def guarded(body: Callable[[int], None], number: int) -> None:
        try:
            start.wait()
            body(number)
        except BaseException as error:
            wrong.append(repr(error))

    def change(number: int) -> None:
        """Its own half of the names, so that it knows which are there."""
        rng = np.random.default_rng(number)
        own = [index for index in range(len(NAMES)) if index % 2 == number]
        present: set[int] = set()
        while running():
            index = int(rng.choice(own))
            name, adapter = NAMES[index], marked(index + 1, changed[number])
            if index not in present:
                table.add(name, adapter)
                present.add(index)
            elif rng.random() < 0.7:
                table.replace(name, adapter)
            else:
                table.remove(name)
                present.remove(index)
            changed[number] += 1

    def read(number: int) -> None:
        rng = np.random.default_rng(100 + number)
        while running():
            with table.snapshot() as lease:
                names = lease.names()
                rows = dict(zip(names, lease.rows(names).tolist(), strict=True))
                if len(set(rows.values())) != len(rows):
                    wrong.append(f"two names share a row: {rows}")
                first: dict[str, float] = {}
                for _ in range(3):
                    for name in rng.permutation(names).tolist():
                        if name != "base":
                            look(lease.arrays, name, rows[name], first)
                    if any(lease.arrays[tensor][0].any() for tensor in MARKED[:4]):
                        wrong.append("the base is not the base")
                    time.sleep(0)
                if lease.names() != names and set(lease.names()) != set(names):
                    wrong.append("the names of a lease changed")
                if lease.rows(names).tolist() != list(rows.values()):
                    wrong.append("the rows of a lease changed")
            checked[number] += 1

    def look(arrays: object, name: str, row: int, first: dict[str, float]) -> None:
        seen = {float(edge) for tensor in MARKED for edge in extremes(arrays[tensor][row])}  # type: ignore[index]
        if len(seen) != 1:
            wrong.append(f"{name}: a torn row {sorted(seen)}")
            return
        mark = seen.pop()
        if mark // 1000 != NAMES.index(name) + 1:
            wrong.append(f"{name}: the row of another one {mark}")
        if first.setdefault(name, mark) != mark:
            wrong.append(f"{name}: {first[name]} became {mark} under a lease")

    def extremes(values: np.ndarray) -> tuple[float, float]:
        return values.min(), values.max()

    bodies = [(change, 0), (change, 1), (read, 0), (read, 1)]
    threads = [threading.Thread(target=guarded, args=each, daemon=True) for each in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
        assert not thread.is_alive(), "a thread hangs"
    return wrong, sum(checked), sum(changed)


@pytest.fixture
def table() -> AdapterTable:
    base = base_row(LAYOUT, {"head": (np.zeros((2, 4), np.float32), None)})
    return AdapterTable(LAYOUT, base)


def test_readers_see_whole_rows_of_their_own(table: AdapterTable) -> None:
    wrong, checked, changed = hammer(table, 3.0)
    assert not wrong
    assert checked > 50 and changed > 50
    # what was removed is gone, and what is free is the base's
    for name in table.names()[1:]:
        table.remove(name)
    with table.snapshot() as lease:
        for tensor, array in lease.arrays.items():
            assert (array == array[0]).all(), tensor


def written_in_place(self: AdapterTable, name: str, adapter: Adapter, *, allow_mismatch: bool = False) -> int:
    from deployfa.tables import row_of

    row = self.row(name)
    self._memory.write(row, row_of(adapter, LAYOUT, self._base))
    return row


def released_at_once(self: History) -> list[int]:
    """The names of a lease stay, so that only the numbers can tell."""
    versions = list(self._retired)
    self._retired.clear()
    return [version.row for version in versions]


def published_before_written(self: AdapterTable, name: str, adapter: Adapter, *, allow_mismatch: bool = False) -> int:
    from deployfa.tables import row_of
    from deployfa.tables.history import Member

    with self._changing:
        version = Version(Member(name=name, method="test"), self._history.take())
        self._history.add([version])
        self._memory.write(version.row, row_of(adapter, LAYOUT, self._base))
    return version.row


@pytest.mark.parametrize(
    ("owner", "method", "fault"),
    [
        (AdapterTable, "replace", written_in_place),
        (AdapterTable, "add", published_before_written),
        (History, "_released", released_at_once),
    ],
    ids=["replaces in place", "publishes before it has written", "reuses rows that are read"],
)
def test_the_readers_notice(
    table: AdapterTable, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, fault: Callable[..., object]
) -> None:
    monkeypatch.setattr(owner, method, fault)
    wrong, _, _ = hammer(table, 20.0)
    # what the readers saw, not an exception of the fault itself
    assert any("a torn row" in text or "the row of another one" in text or "under a lease" in text for text in wrong)


def test_threads_do_not_add_more_than_there_is_room_for() -> None:
    base = base_row(LAYOUT, {"head": (np.zeros((2, 4), np.float32), None)})
    table = AdapterTable(LAYOUT, base, max_adapters=3)
    adapter = marked(1, 0)
    refused: list[str] = []
    start = threading.Barrier(8)

    def add(number: int) -> None:
        start.wait()
        try:
            table.add(f"n{number}", adapter)
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(table) == 4 and len(refused) == 5 and all("full with 3" in text for text in refused)


def test_of_threads_that_add_one_name_one_wins(table: AdapterTable) -> None:
    won: list[int] = []
    lost: list[str] = []
    start = threading.Barrier(6)

    def add(number: int) -> None:
        adapter = marked(number + 1, 0)
        start.wait()
        try:
            table.add("contested", adapter)
            won.append(number)
        except InputError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and lost == 5 * ["adapter 'contested' is in the table already; replace it instead"]
    with table.snapshot() as lease:
        (row,) = lease.rows(["contested"])
        assert lease.labels("contested") == (f"{won[0] + 1}", "x")
        assert (lease.arrays["adapter/lambda"][row] == 1000 * (won[0] + 1)).all()
