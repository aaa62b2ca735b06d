"""The table by name: what comes in comes out, what fails changes nothing, and leases see what they began with."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit
from deployfa.errors import BaseMismatchError, DeployfaError, EditError, InputError, SiteError
from deployfa.tables import AdapterInfo, AdapterTable, Layout, Lease, LowRanks, open_fleet, row_of

from .tiny import BASE_LABELS, HEAD, METHODS, make_adapter, make_layout

Row = dict[str, Array]
Make = Callable[..., AdapterTable]


@pytest.fixture
def make(layout: Layout, base: Row) -> Make:
    """``make(**options)`` → an empty table."""
    return lambda **options: AdapterTable(layout, base, labels=BASE_LABELS, **options)


@pytest.fixture
def table(make: Make) -> AdapterTable:
    """With an adapter of every method under the name of its method."""
    table = make()
    table.add_many((method, make_adapter(method, seed)) for seed, method in enumerate(METHODS))
    return table


def row_in(lease: Lease, name: str) -> Row:
    (number,) = lease.rows([name])
    return {tensor: array[number].copy() for tensor, array in lease.arrays.items()}


def assert_row(row: Row, wanted: Row) -> None:
    assert row.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(row[name], wanted[name])


def state(table: AdapterTable) -> dict[str, tuple[AdapterInfo, dict[str, bytes]]]:
    """Everything that can be asked of a table, the numbers included."""
    with table.snapshot() as lease:
        assert lease.names() == table.names()
        return {
            info.name: (info, {tensor: array[info.row].tobytes() for tensor, array in lease.arrays.items()})
            for info in table.info()
        }


# what comes in comes out


def test_a_new_table_holds_the_base(make: Make, base: Row) -> None:
    table = make()
    assert (len(table), table.names(), table.row("base"), table.labels("base")) == (1, ["base"], 0, BASE_LABELS)
    assert "base" in table and "other" not in table and 0 not in table
    with table.snapshot() as lease:
        assert_row(row_in(lease, "base"), base)


def test_every_adapter_has_its_own_row(table: AdapterTable, layout: Layout, base: Row) -> None:
    assert table.names() == ["base", *METHODS]
    assert len(table) == 1 + len(METHODS)
    with table.snapshot() as lease:
        for seed, method in enumerate(METHODS):
            assert_row(row_in(lease, method), row_of(make_adapter(method, seed), layout, base))


def test_rows_are_what_a_graph_takes(table: AdapterTable) -> None:
    with table.snapshot() as lease:
        ids = lease.rows(["lora", "base", "lora", "vefa"])
        assert ids.dtype == np.int64 and ids.tolist() == [table.row("lora"), 0, table.row("lora"), table.row("vefa")]
        assert lease.rows([]).shape == (0,) and lease.rows([]).dtype == np.int64
        for array in lease.arrays.values():
            assert array.dtype == np.float32 and array.flags.c_contiguous and len(array) == 1 + len(METHODS)


def test_info_says_what_is_where(table: AdapterTable, layout: Layout) -> None:
    infos = {info.name: info for info in table.info()}
    assert list(infos) == table.names()
    size = layout.row_bytes
    assert table.row_bytes == size and table.layout is layout
    assert infos["base"] == AdapterInfo("base", 0, "base", BASE_LABELS, 0, size)
    assert infos["vefa"] == AdapterInfo("vefa", table.row("vefa"), "vefa", BASE_LABELS, 13, size)
    assert infos["head"].labels == ("label 0", "label 1", "label 2")
    assert sorted(info.row for info in infos.values()) == list(range(len(METHODS) + 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        infos["vefa"].row = 0  # type: ignore[misc]


def test_labels_are_those_of_the_head(make: Make) -> None:
    table = make()
    table.add("own", make_adapter("head", seed=2))
    table.add("unnamed", make_adapter("head", seed=2, labels=()))
    table.add("of the base", make_adapter("vefa"))
    table.add("renamed", make_adapter("vefa", labels=("bad", "good")))
    assert table.labels("own") == ("label 0", "label 1", "label 2")
    # a head of its own without names says nothing of what the base's labels mean
    assert table.labels("unnamed") == ()
    assert table.labels("of the base") == BASE_LABELS
    assert table.labels("renamed") == ("bad", "good")
    with table.snapshot() as lease:
        assert lease.labels("own") == ("label 0", "label 1", "label 2") and lease.labels("base") == BASE_LABELS


def test_the_callers_base_may_change_afterwards(layout: Layout, base: Row) -> None:
    table = AdapterTable(layout, base)
    wanted = {name: array.copy() for name, array in base.items()}
    for array in base.values():
        array[...] = 5
    with table.snapshot() as lease:
        assert_row(row_in(lease, "base"), wanted)
    table.add("vefa", make_adapter("vefa"))
    with table.snapshot() as lease:
        assert_row(row_in(lease, "vefa"), row_of(make_adapter("vefa"), layout, wanted))


def test_replacing_and_removing(table: AdapterTable, layout: Layout, base: Row) -> None:
    other = make_adapter("lora", seed=50)
    row = table.replace("vefa", other)
    assert table.row("vefa") == row and table.names() == ["base", *METHODS]
    assert {info.name: info.method for info in table.info()}["vefa"] == "lora"
    table.remove("shift")
    assert "shift" not in table and table.names() == ["base", *(name for name in METHODS if name != "shift")]
    with table.snapshot() as lease:
        assert_row(row_in(lease, "vefa"), row_of(other, layout, base))
        with pytest.raises(InputError, match="adapter 'shift' is not in the table"):
            lease.rows(["shift"])
    # back again: at the end of the list, like any new one
    table.add("shift", make_adapter("shift", seed=1))
    assert table.names()[-1] == "shift"


def test_memory_is_that_of_the_rows(make: Make) -> None:
    table = make()
    assert table.memory_bytes == table.row_bytes
    for number in range(100):
        table.add(f"n{number}", make_adapter("vefa", number))
    assert table.memory_bytes == 101 * table.row_bytes
    for number in range(100):
        table.replace("n7", make_adapter("vefa", number))
        table.remove(f"n{99 - number}") if number < 50 else table.add(f"m{number}", make_adapter("shift"))
    # one row more: a replacement is written before the old one is free
    assert table.memory_bytes == 102 * table.row_bytes


def test_growing_does_not_move_what_readers_hold(make: Make) -> None:
    table = make()
    table.add("first", make_adapter("mixture"))
    with table.snapshot() as lease:
        before = {name: (array.__array_interface__["data"][0], array.copy()) for name, array in lease.arrays.items()}
        for number in range(3000):
            table.add(f"n{number}", make_adapter("head", number))
        with table.snapshot() as later:
            for name, (address, values) in before.items():
                assert later.arrays[name].__array_interface__["data"][0] == address
                assert len(later.arrays[name]) == 3002 and len(lease.arrays[name]) == 2
                np.testing.assert_array_equal(lease.arrays[name], values)


def test_a_lorfa_that_is_added_to_the_output_takes_the_base_s_weights(base: Row, tmp_path: Path) -> None:
    layout = make_layout(low_ranks=[LowRanks(where="output", sites=["q"], in_features=5, rank=3, widths=[7])], heads=[])
    base = {name: np.zeros(shape, np.float32) for name, shape in layout.shapes().items()}
    weights = {"q": lambda: np.arange(35, dtype=np.float32).reshape(7, 5)}
    adapter = make_adapter("lorfa", edits={"q": make_adapter("lorfa").edits["q"]})
    with pytest.raises(EditError, match=r"adapter 'a': site 'q' takes a LoRFA as the LoRA .* needs the base's weights"):
        AdapterTable(layout, base).add("a", adapter)
    AdapterTable(layout, base).save(tmp_path / "x.fleet")
    fleet = open_fleet(tmp_path / "x.fleet")
    for table in (AdapterTable(layout, base, weights=weights), AdapterTable.from_fleet(fleet, weights=weights)):
        table.add("a", adapter)
        with table.snapshot() as lease:
            assert_row(row_in(lease, "a"), row_of(adapter, layout, base, weights=weights))


# what fails changes nothing


def unfit(**changes: Any) -> Adapter:
    return make_adapter("vefa", **changes)


UNFIT: dict[str, tuple[Adapter, type[DeployfaError], str]] = {
    "another base": (unfit(base=BaseReference(fingerprint="sha256:x")), BaseMismatchError, "trained on base x"),
    "no base": (unfit(base=BaseReference()), BaseMismatchError, "names no base fingerprint"),
    "NaN": (unfit(edits={"q": Edit(lam=np.full(5, np.nan))}), EditError, "lambda holds NaN"),
    "infinity in a head": (
        unfit(modules={HEAD: {"weight": np.ones((2, 3)), "bias": np.array([0, np.inf])}}),
        EditError,
        "bias holds NaN, infinity",
    ),
    "a wrong shape": (unfit(edits={"q": Edit(lam=np.ones(6))}), EditError, "the layer has 5 features"),
    "an unknown site": (unfit(edits={"qq": Edit(lam=np.ones(5))}), SiteError, "site 'qq' not found"),
    "too many labels": (unfit(modules={HEAD: {"weight": np.ones((9, 3))}}), EditError, "--max-labels 9"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_does_not_fit_changes_nothing(table: AdapterTable, case: str) -> None:
    adapter, kind, says = UNFIT[case]
    before, memory = state(table), table.memory_bytes
    for attempt in (lambda: table.add("new", adapter), lambda: table.replace("vefa", adapter)):
        with pytest.raises(kind) as caught:
            attempt()
        text = str(caught.value)
        assert says in text and text.startswith("adapter '") and "\n" not in text
    assert state(table) == before and table.memory_bytes == memory


@pytest.mark.parametrize("case", UNFIT)
def test_of_many_all_or_none(table: AdapterTable, case: str) -> None:
    adapter, kind, says = UNFIT[case]
    before = state(table)
    fit = {f"n{number}": make_adapter("mixture", number) for number in range(5)}
    with pytest.raises(kind, match="adapter 'unfit': ") as caught:
        table.add_many(fit | {"unfit": adapter} | {"after": make_adapter("vefa")})
    assert says in str(caught.value)
    assert state(table) == before
    rows = table.add_many(fit)
    # the rows that were given up are used again, and nothing is left in them
    assert sorted(rows.values()) == list(range(1 + len(METHODS), 6 + len(METHODS)))
    assert {name: table.row(name) for name in fit} == rows


def test_an_iterable_that_breaks_adds_nothing(table: AdapterTable, base: Row) -> None:
    before = state(table)

    def broken() -> Iterator[tuple[str, Adapter]]:
        yield "one", make_adapter("lora", 3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        table.add_many(broken())
    assert state(table) == before
    with table.snapshot() as lease:
        # what was written there already is overwritten
        for name, array in lease.arrays.items():
            np.testing.assert_array_equal(array[1 + len(METHODS)], base[name])


def test_mismatch_on_request(make: Make) -> None:
    table = make()
    stranger = make_adapter("vefa", base=BaseReference(fingerprint="sha256:x"))
    table.add("a", stranger, allow_mismatch=True)
    table.add_many({"b": stranger}, allow_mismatch=True)
    table.replace("a", stranger, allow_mismatch=True)
    assert table.names() == ["base", "a", "b"]


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\ud800", None, 3])
def test_names_that_cannot_be(table: AdapterTable, name: Any) -> None:
    with pytest.raises(InputError, match="cannot name an adapter; pass a text of printable characters"):
        table.add(name, make_adapter("vefa"))
    assert name not in table
    with pytest.raises(InputError, match="is not in the table"):
        table.remove(name)


def test_the_base_is_nobodys(table: AdapterTable) -> None:
    for attempt in (
        lambda: table.add("base", make_adapter("vefa")),
        lambda: table.add_many({"base": make_adapter("vefa")}),
        lambda: table.replace("base", make_adapter("vefa")),
        lambda: table.remove("base"),
    ):
        with pytest.raises(InputError, match="'base' is row 0, the model without an adapter; pass another name"):
            attempt()


def test_a_name_that_is_there(table: AdapterTable) -> None:
    before = state(table)
    with pytest.raises(InputError, match="adapter 'vefa' is in the table already; replace it instead"):
        table.add("vefa", make_adapter("lora"))
    with pytest.raises(InputError, match="adapter 'twice' is given twice; pass each name once"):
        table.add_many([("twice", make_adapter("lora")), ("twice", make_adapter("lora"))])
    assert state(table) == before


def test_a_name_that_an_iterable_adds_in_between(table: AdapterTable) -> None:
    """The check before the work is not the one that counts."""

    def pairs() -> Iterator[tuple[str, Adapter]]:
        yield "new", make_adapter("vefa")
        table.add("new", make_adapter("lora"))

    with pytest.raises(InputError, match="adapter 'new' is in the table already"):
        table.add_many(pairs())
    assert {info.name: info.method for info in table.info()}["new"] == "lora"


def test_an_unknown_name_shows_the_nearest(make: Make) -> None:
    table = make()
    with pytest.raises(InputError, match=r"^adapter 'shop' is not in the table; names: base$"):
        table.row("shop")
    table.add_many({f"shop-{number}": make_adapter("vefa") for number in range(30)})
    with table.snapshot() as lease:
        for attempt in (
            lambda: table.row("shp-7"),
            lambda: table.labels("shp-7"),
            lambda: table.remove("shp-7"),
            lambda: table.replace("shp-7", make_adapter("vefa")),
            lambda: lease.rows(["base", "shp-7"]),
            lambda: lease.labels("shp-7"),
        ):
            with pytest.raises(
                InputError, match=r"'shp-7' is not in the table; nearest names: shop-7, .* and 27 more$"
            ):
                attempt()


def test_a_full_table(make: Make) -> None:
    table = make(max_adapters=3)
    assert table.max_adapters == 3
    table.add_many({name: make_adapter("vefa") for name in "ab"})
    before = state(table)
    full = "the table is full with 3 adapters; remove one, or make the table with a larger max_adapters"
    with pytest.raises(InputError, match=full):
        table.add_many({name: make_adapter("vefa") for name in "cd"})
    assert state(table) == before
    table.add("c", make_adapter("vefa"))
    with pytest.raises(InputError, match=full):
        table.add("d", make_adapter("vefa"))
    # a full table can still be changed
    table.replace("a", make_adapter("lora"))
    table.remove("b")
    table.add("d", make_adapter("vefa"))


def test_open_leases_may_use_up_the_rows(make: Make) -> None:
    table = make(max_adapters=1)
    table.add("a", make_adapter("vefa"))
    leases = []
    with pytest.raises(
        InputError, match=r"all 66 rows of the table are in use, 64 of them by what was replaced .*65 open"
    ):
        for seed in range(70):
            leases.append(table.snapshot())
            table.replace("a", make_adapter("vefa", seed))
    assert len(leases) == 65
    for lease in leases:
        lease.close()
    table.replace("a", make_adapter("vefa", 9))


@pytest.mark.parametrize("number", [0, -1])
def test_room_for_nothing(make: Make, number: int) -> None:
    with pytest.raises(InputError, match=f"max_adapters is {number}; pass 1 or more"):
        make(max_adapters=number)


def test_room_that_no_machine_has(make: Make) -> None:
    with pytest.raises(InputError, match=r"GB of address space for .* rows; pass a smaller max_adapters"):
        make(max_adapters=2**58)


def test_a_table_is_made_of_a_layout_and_its_base(layout: Layout, base: Row) -> None:
    with pytest.raises(InputError, match="the layout makes no sense: it has no tensors"):
        AdapterTable(make_layout(vectors=[], low_ranks=[], heads=[]), {})
    with pytest.raises(EditError, match="a row lacks 'adapter/delta'"):
        AdapterTable(layout, {name: array for name, array in base.items() if name != "adapter/delta"})
    with pytest.raises(EditError, match="'adapter/lambda' of the base's row is not zero"):
        AdapterTable(layout, row_of(make_adapter("vefa"), layout, base))


# leases


def test_a_lease_sees_what_it_began_with(table: AdapterTable, layout: Layout, base: Row) -> None:
    old = {method: row_of(make_adapter(method, seed), layout, base) for seed, method in enumerate(METHODS)}
    with table.snapshot() as lease:
        table.replace("vefa", make_adapter("lora", 70))
        table.replace("vefa", make_adapter("shift", 71))
        table.remove("lorfa")
        table.add("lorfa", make_adapter("vefa", 72))
        table.remove("head")
        # as many new ones as would fill every row that could be free
        table.add_many({f"n{number}": make_adapter("mixture", number) for number in range(20)})
        for method in METHODS:
            assert_row(row_in(lease, method), old[method])
        assert lease.names()[0] == "base" and sorted(lease.names()[1:]) == sorted(METHODS)
        assert lease.labels("head") == ("label 0", "label 1", "label 2")
        with pytest.raises(InputError, match="'n3' is not in the table"):
            lease.rows(["n3"])
        with table.snapshot() as later:
            assert_row(row_in(later, "vefa"), row_of(make_adapter("shift", 71), layout, base))
            assert_row(row_in(later, "lorfa"), row_of(make_adapter("vefa", 72), layout, base))
            assert later.epoch > lease.epoch


def test_a_row_is_reused_only_after_the_last_lease_that_saw_it(make: Make, layout: Layout, base: Row) -> None:
    table = make()
    row = table.add("a", make_adapter("vefa"))
    first, second = table.snapshot(), table.snapshot()
    table.remove("a")
    late = table.snapshot()
    first.close()
    assert table.add("b", make_adapter("vefa", 1)) != row
    assert_row(row_in(second, "a"), row_of(make_adapter("vefa"), layout, base))
    second.close()
    # the late lease does not see it, so it does not keep it
    assert table.add("c", make_adapter("vefa", 2)) == row
    late.close()


def test_the_row_of_a_removed_adapter_becomes_the_base(make: Make, base: Row) -> None:
    table = make()
    table.add("keep", make_adapter("lora"))
    row = table.add("a", make_adapter("mixture", modules=make_adapter("head", 3).modules))
    table.add("b", make_adapter("vefa"))
    lease = table.snapshot()
    stale = lease.rows(["a"])[0]
    assert stale == row
    table.remove("a")
    assert lease.arrays["adapter/delta"][row].any()
    lease.close()
    with table.snapshot() as later:
        assert_row({name: array[row] for name, array in later.arrays.items()}, base)


def test_every_change_makes_an_epoch_and_a_failure_none(table: AdapterTable) -> None:
    epochs = []
    for change in (
        lambda: None,
        lambda: table.add("a", make_adapter("vefa")),
        lambda: table.replace("a", make_adapter("vefa")),
        lambda: table.remove("a"),
        lambda: table.add_many({"b": make_adapter("vefa"), "c": make_adapter("vefa")}),
    ):
        change()
        with table.snapshot() as lease, table.snapshot() as same:
            epochs.append(lease.epoch)
            assert lease.epoch == same.epoch and lease.arrays is same.arrays
    assert len(set(epochs)) == 5 and epochs == sorted(epochs)
    with pytest.raises(DeployfaError):
        table.add("b", make_adapter("vefa"))
    with table.snapshot() as lease:
        assert lease.epoch == epochs[-1]


def test_a_closed_lease_is_closed(table: AdapterTable) -> None:
    lease = table.snapshot()
    with lease:
        pass
    lease.close()
    for attempt in (
        lambda: lease.arrays,
        lambda: lease.rows(["vefa"]),
        lambda: lease.labels("vefa"),
        lambda: lease.names(),
    ):
        with pytest.raises(InputError, match=r"the lease is closed, .*; take a new snapshot\(\)"):
            attempt()


def test_closing_a_lease_twice_closes_no_other(make: Make) -> None:
    table = make()
    row = table.add("a", make_adapter("vefa"))
    first, second = table.snapshot(), table.snapshot()
    first.close()
    first.close()
    table.remove("a")
    assert table.add("b", make_adapter("vefa")) != row
    second.close()
    second.close()
    assert table.add("c", make_adapter("vefa")) == row


def test_a_lease_closes_after_an_error_too(make: Make) -> None:
    table = make()
    row = table.add("a", make_adapter("vefa"))
    with pytest.raises(ZeroDivisionError), table.snapshot():
        table.remove("a")
        _ = 1 / 0
    assert table.add("b", make_adapter("vefa")) == row


def test_leases_are_read_only(table: AdapterTable) -> None:
    with table.snapshot() as lease:
        for array in lease.arrays.values():
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
        with pytest.raises(TypeError):
            lease.arrays["adapter/lambda"] = np.zeros(1)  # type: ignore[index]


def test_a_lost_lease_warns_and_keeps_its_rows(make: Make, layout: Layout, base: Row) -> None:
    table = make()
    row = table.add("a", make_adapter("vefa"))
    lost = [table.snapshot()]
    arrays = lost[0].arrays
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lost.clear()
    assert [str(warning.message) for warning in caught] == ["a lease of an adapter table was never closed"]
    table.remove("a")
    assert table.add("b", make_adapter("lora")) != row
    # whoever took the arrays and forgot the lease still reads the old numbers
    assert_row({name: array[row] for name, array in arrays.items()}, row_of(make_adapter("vefa"), layout, base))
