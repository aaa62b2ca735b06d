"""Fleet files: what is saved comes back, any safetensors reader opens it, and a damaged or hostile one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from deployfa.edits import Array
from deployfa.errors import AdapterFormatError, DeployfaError, EditError, InputError, OutputExistsError
from deployfa.tables import AdapterTable, Fleet, Layout, Member, base_row, open_fleet, row_of, write_fleet

from .tiny import BASE_LABELS, HEAD, METHODS, base_head, make_adapter, make_layout

Row = dict[str, Array]
MEMBERS = ("base", *METHODS)


@pytest.fixture
def table(layout: Layout, base: Row) -> AdapterTable:
    table = AdapterTable(layout, base, labels=BASE_LABELS)
    table.add_many((method, make_adapter(method, seed)) for seed, method in enumerate(METHODS))
    return table


@pytest.fixture
def path(table: AdapterTable, tmp_path: Path) -> Path:
    """A fleet with an adapter of every method."""
    table.save(tmp_path / "all.fleet")
    return tmp_path / "all.fleet"


def wanted_rows(layout: Layout, base: Row) -> dict[str, Row]:
    return {"base": base} | {m: row_of(make_adapter(m, seed), layout, base) for seed, m in enumerate(METHODS)}


def assert_holds(table: AdapterTable, wanted: dict[str, Row]) -> None:
    assert table.names() == list(wanted)
    with table.snapshot() as lease:
        for name, row in wanted.items():
            (number,) = lease.rows([name])
            for tensor, values in row.items():
                assert lease.arrays[tensor][number].tobytes() == values.tobytes(), (name, tensor)


# what is saved comes back


def test_a_fleet_comes_back_as_a_table(path: Path, table: AdapterTable, layout: Layout, base: Row) -> None:
    again = AdapterTable.from_fleet(open_fleet(path))
    assert_holds(again, wanted_rows(layout, base))
    assert again.info() == table.info()
    assert again.layout == layout and again.labels("base") == BASE_LABELS and again.labels("head")[2] == "label 2"
    assert again.memory_bytes == len(MEMBERS) * layout.row_bytes


def test_a_table_from_a_fleet_is_a_table_like_any_other(path: Path, layout: Layout, base: Row) -> None:
    table = AdapterTable.from_fleet(open_fleet(str(path)))
    path.unlink()
    with table.snapshot() as lease:
        table.add_many({f"n{number}": make_adapter("mixture", number) for number in range(100)})
        table.replace("vefa", make_adapter("lora", 7))
        table.remove("head")
        for tensor, values in wanted_rows(layout, base)["head"].items():
            assert lease.arrays[tensor][lease.rows(["head"])[0]].tobytes() == values.tobytes()
    wanted = wanted_rows(layout, base) | {"vefa": row_of(make_adapter("lora", 7), layout, base)}
    del wanted["head"]
    wanted |= {f"n{number}": row_of(make_adapter("mixture", number), layout, base) for number in range(100)}
    assert_holds(table, wanted)
    # its base's labels are still the base's, and those of adapters without a head
    table.add("late", make_adapter("vefa"))
    assert table.labels("late") == BASE_LABELS


def test_the_arrays_are_the_rows_and_cannot_be_written(path: Path, layout: Layout, base: Row) -> None:
    fleet = open_fleet(path)
    assert [member.name for member in fleet.members] == list(MEMBERS) and len(fleet) == len(MEMBERS)
    assert fleet.data_bytes == len(MEMBERS) * layout.row_bytes
    assert fleet.arrays is fleet.arrays
    for number, row in enumerate(wanted_rows(layout, base).values()):
        for tensor, values in row.items():
            np.testing.assert_array_equal(fleet.arrays[tensor][number], values)
    for array in fleet.arrays.values():
        assert array.dtype == np.float32 and array.flags.aligned and array.flags.c_contiguous
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_any_safetensors_reader_opens_it(path: Path) -> None:
    fleet = open_fleet(path)
    tensors = safetensors.numpy.load_file(path)
    assert tensors.keys() == fleet.arrays.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, fleet.arrays[name])
    with safetensors.safe_open(path, "numpy") as handle:
        metadata = handle.metadata()
    assert metadata["format"] == "deployfa-fleet/1"
    adapters = json.loads(metadata["adapters"])
    assert adapters[1] == {"name": "vefa", "method": "vefa", "labels": list(BASE_LABELS), "parameters": 13}


def test_what_another_writer_wrote_is_read(path: Path, tmp_path: Path, layout: Layout, base: Row) -> None:
    """The safetensors library orders tensors its own way and aligns to eight bytes."""
    with safetensors.safe_open(path, "numpy") as handle:
        metadata = handle.metadata()
    other = tmp_path / "other.fleet"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), other, metadata)
    assert other.read_bytes() != path.read_bytes()
    assert_holds(AdapterTable.from_fleet(open_fleet(other)), wanted_rows(layout, base))


def test_numbers_begin_at_a_cache_line(path: Path) -> None:
    begin = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert begin % 64 == 0
    assert min(open_fleet(path).starts.values()) == begin


def test_saving_leaves_free_rows_out(table: AdapterTable, tmp_path: Path, layout: Layout, base: Row) -> None:
    wanted = wanted_rows(layout, base)
    for name in ("vefa", "lorfa", "head"):
        table.remove(name)
        del wanted[name]
    table.replace("shift", make_adapter("mixture", 60))
    wanted["shift"] = row_of(make_adapter("mixture", 60), layout, base)
    table.save(tmp_path / "some.fleet")
    fleet = open_fleet(tmp_path / "some.fleet")
    assert len(fleet) == 5
    again = AdapterTable.from_fleet(fleet)
    assert_holds(again, wanted)
    assert [info.row for info in again.info()] == [0, 1, 2, 3, 4]


def test_one_table_gives_one_file(path: Path, table: AdapterTable, tmp_path: Path) -> None:
    table.save(tmp_path / "again.fleet")
    assert (tmp_path / "again.fleet").read_bytes() == path.read_bytes()
    AdapterTable.from_fleet(open_fleet(path)).save(path, force=True)
    assert (tmp_path / "again.fleet").read_bytes() == path.read_bytes()


def test_a_fleet_of_the_base_alone(layout: Layout, base: Row, tmp_path: Path) -> None:
    AdapterTable(layout, base).save(tmp_path / "none.fleet")
    table = AdapterTable.from_fleet(open_fleet(tmp_path / "none.fleet"))
    assert_holds(table, {"base": base})


def test_room_for_a_fleet(path: Path) -> None:
    fleet = open_fleet(path)
    table = AdapterTable.from_fleet(fleet, max_adapters=len(METHODS))
    with pytest.raises(InputError, match="the table is full with 7 adapters"):
        table.add("more", make_adapter("vefa"))
    with pytest.raises(InputError, match=r"' has 7 adapters, max_adapters is 6; pass 7 or more"):
        AdapterTable.from_fleet(fleet, max_adapters=6)


def test_room_for_a_fleet_beyond_the_usual(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployfa.tables.adapter_table.MAX_ADAPTERS", 3)
    assert AdapterTable.from_fleet(open_fleet(path)).max_adapters == len(METHODS)


# writing


def test_a_file_that_is_there_is_kept(path: Path, table: AdapterTable) -> None:
    before = path.read_bytes()
    table.remove("vefa")
    with pytest.raises(OutputExistsError):
        table.save(path)
    assert path.read_bytes() == before
    table.save(path, force=True)
    assert len(open_fleet(path)) == len(MEMBERS) - 1


def members(count: int) -> list[Member]:
    return [Member(name="base", method="base"), *(Member(name=f"n{i}", method="vefa") for i in range(1, count))]


def vefa_rows(layout: Layout, base: Row, count: int) -> Iterator[Row]:
    yield base
    for number in range(1, count):
        yield row_of(make_adapter("vefa", number), layout, base)


BAD_ROWS: dict[str, tuple[Callable[[Row], Any], str]] = {
    "NaN": (lambda row: row["adapter/delta"].fill(np.nan), "adapter 'n2': 'adapter/delta' holds NaN or infinity"),
    "infinity": (lambda row: row["adapter/q/A"].fill(np.inf), "adapter 'n2': 'adapter/q/A' holds NaN or infinity"),
    "a shape": (
        lambda row: row.update({"adapter/delta": np.zeros(12, np.float32)}),
        "adapter 'n2': 'adapter/delta' is float32 (12,) in a row, float32 (13,) in the layout",
    ),
    "a dtype": (lambda row: row.update({"adapter/delta": np.zeros(13)}), "'adapter/delta' is float64 (13,) in a row"),
    "a tensor less": (lambda row: row.pop("adapter/delta"), "adapter 'n2': a row lacks 'adapter/delta'"),
    "a tensor more": (lambda row: row.update({"x": np.zeros(1)}), "adapter 'n2': a row has 'x'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_is_none_writes_nothing(layout: Layout, base: Row, tmp_path: Path, case: str) -> None:
    damage, says = BAD_ROWS[case]
    rows = list(vefa_rows(layout, base, 4))
    damage(rows[2])
    with pytest.raises(EditError) as caught:
        write_fleet(tmp_path / "x.fleet", layout, members(4), rows)
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rows", "says"), [(3, "there are 3 rows for 4 members"), (5, "more rows than the 4 members")])
def test_as_many_rows_as_members(layout: Layout, base: Row, tmp_path: Path, rows: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        write_fleet(tmp_path / "x.fleet", layout, members(4), vefa_rows(layout, base, rows))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "its first adapter is not 'base'"),
        (["a", "base"], "its first adapter is not 'base'"),
        (["base", "a", "a"], "adapter 'a' is there twice"),
        (["base", "base"], "'base' is row 0"),
        (["base", ""], "'' cannot name an adapter"),
        (["base", "a\nb"], "cannot name an adapter"),
    ],
)
def test_names_that_cannot_be_written(layout: Layout, base: Row, tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        write_fleet(tmp_path / "x.fleet", layout, [Member(name=name, method="m") for name in names], [base] * 3)
    assert not list(tmp_path.iterdir())


def test_a_base_that_changes_something_is_not_written(layout: Layout, base: Row, tmp_path: Path) -> None:
    rows = [row_of(make_adapter("vefa"), layout, base)]
    with pytest.raises(EditError, match=r"adapter 'base': 'adapter/lambda' of the base's row is not zero"):
        write_fleet(tmp_path / "x.fleet", layout, members(1), rows)


def test_a_header_that_no_reader_takes_is_not_written(
    layout: Layout, base: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployfa.tables.fleet._MAX_HEADER_BYTES", 2000)
    with pytest.raises(InputError, match=r"100 adapters need a header of .* MB, .*; write several fleets"):
        write_fleet(tmp_path / "x.fleet", layout, members(100), vefa_rows(layout, base, 100))


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """In another process, whose files may not grow beyond 4 KB."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import tiny
        from deployfa.errors import StorageError
        from deployfa.tables import AdapterTable, base_row
        layout = tiny.make_layout()
        table = AdapterTable(layout, base_row(layout, {{tiny.HEAD: tiny.base_head()}}))
        table.add_many({{f"n{{i}}": tiny.make_adapter("vefa") for i in range(50)}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            table.save(Path({str(tmp_path)!r}) / "x.fleet")
        except StorageError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no space left to write '")
    assert not list(tmp_path.iterdir())


# files that are none


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:begin]), content[begin:]


def join(path: Path, header: bytes, data: bytes, *, align: bool = True) -> None:
    header += b" " * (-(8 + len(header)) % 64) if align else b""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], extra: bytes = b"") -> None:
    """Write ``path`` again with another header."""
    header, data = split(path)
    change(header)
    join(path, json.dumps(header).encode(), data + extra)


def in_metadata(key: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """``change`` gets what is in the metadata's JSON under ``key``, and may return something else."""

    def apply(header: dict[str, Any]) -> None:
        value = json.loads(header["__metadata__"][key])
        changed = change(value)
        header["__metadata__"][key] = json.dumps(value if changed is None else changed)

    return apply


def in_tensor(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


def swap_starts(header: dict[str, Any]) -> None:
    """Two tensors of one size on the same bytes."""
    header["adapter/q/B"]["data_offsets"] = header["adapter/k/B"]["data_offsets"]


def reach_over(header: dict[str, Any]) -> None:
    begin, end = header["adapter/k/B"]["data_offsets"]
    header["adapter/k/B"]["data_offsets"] = [begin - 4, end - 4]


def move_border(header: dict[str, Any]) -> None:
    """Four bytes of one tensor go to the next: no hole, no overlap, and both of a wrong length."""
    order = sorted((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    (_, first), (_, second) = order[:2]
    header[first]["data_offsets"][1] += 4
    header[second]["data_offsets"][0] += 4


def add_segment(layout: dict[str, Any]) -> None:
    layout["vectors"][0]["segments"].append({"site": "z", "start": 13, "stop": 10**15})


N = len(MEMBERS)
LAMBDA = "adapter/lambda"
HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no metadata": (lambda h: h.pop("__metadata__"), "its format is 'unnamed', not 'deployfa-fleet/1'"),
    "another format": (lambda h: h["__metadata__"].update(format="pt"), "its format is 'pt'"),
    "a later format": (
        lambda h: h["__metadata__"].update(format="deployfa-fleet/2"),
        "its format is 'deployfa-fleet/2'",
    ),
    "metadata that is a list": (lambda h: h.update(__metadata__=[]), "Expected `object`, got `array`"),
    "metadata that is no text": (lambda h: h["__metadata__"].update(format=1), "Expected `str`, got `int`"),
    "no layout": (lambda h: h["__metadata__"].pop("layout"), "Input data was truncated"),
    "a layout that is no JSON": (lambda h: h["__metadata__"].update(layout="{"), "Input data was truncated"),
    "a layout without vectors": (
        in_metadata("layout", lambda v: v.pop("vectors") and None),
        "required field `vectors`",
    ),
    "a layout of another type": (in_metadata("layout", lambda v: [1]), "Expected `object`, got `array`"),
    "a part that there is not": (
        in_metadata("layout", lambda v: v["vectors"][0].update(part="gamma")),
        "Invalid enum value 'gamma'",
    ),
    "a layout without tensors": (
        in_metadata("layout", lambda v: v.update(vectors=[], low_ranks=[], heads=[])),
        "the layout makes no sense: it has no tensors",
    ),
    "a layout with another tensor": (
        in_metadata("layout", lambda v: v["heads"][0].update(site="other")),
        "it has the tensor 'adapter/classifier/bias', unlike its layout",
    ),
    "a layout that lies about a width": (
        in_metadata("layout", lambda v: v["low_ranks"][0].update(widths=[5, 6])),
        f"'adapter/k/B' is F32 [{N}, 3, 5], its layout says F32 [{N}, 3, 6]",
    ),
    "a layout that lies about a rank": (
        in_metadata("layout", lambda v: v["low_ranks"][0].update(rank=4)),
        "its layout says F32",
    ),
    "a layout of 10^15 numbers": (
        in_metadata("layout", add_segment),
        f"'{LAMBDA}' is F32 [{N}, 13], its layout says F32 [{N}, 1000000000000000]",
    ),
    "a layout of sizes below one": (
        in_metadata("layout", lambda v: v["heads"][0].update(out_features=-4)),
        "the head 'classifier' has a size below 1",
    ),
    "a layout with a size that is no whole number": (
        in_metadata("layout", lambda v: v["heads"][0].update(out_features=4.5)),
        "Expected `int`, got `float`",
    ),
    "a layout whose widths are too few": (
        in_metadata("layout", lambda v: v["low_ranks"][0].update(widths=[5])),
        "a low rank has 2 sites and 1 widths",
    ),
    "no adapters": (lambda h: h["__metadata__"].pop("adapters"), "Input data was truncated"),
    "an empty list of adapters": (in_metadata("adapters", lambda v: []), "its first adapter is not 'base'"),
    "adapters that are a number": (in_metadata("adapters", lambda v: 10**12), "Expected `array`, got `int`"),
    "an adapter without a name": (
        in_metadata("adapters", lambda v: v[2].pop("name") and None),
        "required field `name`",
    ),
    "an adapter whose name is a number": (in_metadata("adapters", lambda v: v[2].update(name=5)), "Expected `str`"),
    "an adapter with an empty name": (
        in_metadata("adapters", lambda v: v[2].update(name="")),
        "'' cannot name an adap",
    ),
    "an adapter with a terminal's codes in its name": (
        in_metadata("adapters", lambda v: v[2].update(name="\x1b[2J")),
        "'\\x1b[2J' cannot name an adapter",
    ),
    "two adapters of one name": (
        in_metadata("adapters", lambda v: v[2].update(name="vefa")),
        "adapter 'vefa' is there twice",
    ),
    "two bases": (in_metadata("adapters", lambda v: v[2].update(name="base")), "'base' is row 0"),
    "a base that is not first": (in_metadata("adapters", lambda v: v.reverse()), "its first adapter is not 'base'"),
    "an adapter less": (in_metadata("adapters", lambda v: v.pop() and None), f"[{N}, "),
    "an adapter more": (in_metadata("adapters", lambda v: v.append(v[1] | {"name": "x"})), f"F32 [{N + 1}, "),
    "a tensor less": (lambda h: h.pop(LAMBDA), f"it lacks the tensor '{LAMBDA}', unlike its layout"),
    "a tensor more": (
        lambda h: h.update({"adapter/a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
        "it has the tensor 'adapter/a', unlike its layout",
    ),
    "a tensor of another dtype": (in_tensor(LAMBDA, dtype="I32"), f"'{LAMBDA}' is I32 [{N}, 13], its layout says F32"),
    "a tensor of half the bytes": (in_tensor(LAMBDA, dtype="F16"), f"'{LAMBDA}' is F16"),
    "a tensor turned around": (in_tensor(LAMBDA, shape=[13, N]), f"'{LAMBDA}' is F32 [13, {N}]"),
    "a tensor of negative sizes": (in_tensor(LAMBDA, shape=[-N, -13]), f"'{LAMBDA}' is F32 [-{N}, -13]"),
    "a tensor of huge sizes": (in_tensor(LAMBDA, shape=[2**63, 2**63]), "adapter/lambda"),
    "a shape that is none": (in_tensor(LAMBDA, shape="8"), "Expected `array`, got `str`"),
    "a tensor that is a list": (lambda h: h.update({LAMBDA: []}), "Expected `object`, got `array`"),
    "a tensor with a field more": (in_tensor(LAMBDA, offset=3), "contains unknown field `offset`"),
    "a tensor without offsets": (lambda h: h[LAMBDA].pop("data_offsets"), "required field `data_offsets`"),
    "three offsets": (in_tensor(LAMBDA, data_offsets=[0, 1, 2]), "Expected `array` of length 2"),
    "offsets that begin below zero": (in_tensor(LAMBDA, data_offsets=[-4, 412]), f"'{LAMBDA}' is at -4:412"),
    "offsets beyond the file": (in_tensor(LAMBDA, data_offsets=[2**62, 2**62 + 416]), "expected"),
    "offsets that end before they begin": (in_tensor(LAMBDA, data_offsets=[416, 0]), "expected"),
    "offsets that leave a hole": (
        in_tensor("adapter/classifier/bias", data_offsets=[10**6, 10**6 + 128]),
        "'adapter/classifier/bias' is at 1000000:1000128",
    ),
    "tensors of wrong lengths": (move_border, "is at 0:"),
    "two tensors on the same bytes": (swap_starts, "is at"),
    "tensors that reach into one another": (reach_over, "is at"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused(path: Path, case: str) -> None:
    change, says = HOSTILE[case]
    rewrite(path, lambda header: None)
    open_fleet(path)
    rewrite(path, change)
    with pytest.raises(AdapterFormatError) as caught:
        open_fleet(path)
    text = str(caught.value)
    assert text.startswith(f"'{path}' is not a fleet file (") and text.endswith("; copy it again, or write it anew")
    assert says in text and "\n" not in text and len(text) < 400 + len(str(path))


def test_bytes_that_no_tensor_has_are_refused(path: Path) -> None:
    rewrite(path, lambda header: None, extra=b"\0" * 8)
    with pytest.raises(AdapterFormatError, match=r"it holds \d+ bytes of numbers, its header says \d+"):
        open_fleet(path)


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}', b"[" * 100_000, b'{"__metadata__":' * 50_000, b"\0" * 64],
    ids=["empty", "open", "a list", "null", "no UTF-8", "no tensor", "deep", "deep in metadata", "zeros"],
)
def test_a_header_that_is_no_header_is_refused(path: Path, header: bytes) -> None:
    join(path, header, b"")
    with pytest.raises(AdapterFormatError, match="is not a fleet file"):
        open_fleet(path)


def test_numbers_that_begin_in_the_midst_of_one_are_refused(path: Path) -> None:
    header, data = split(path)
    encoded = json.dumps(header).encode()
    for spaces, sound in ((-(8 + len(encoded)) % 4, True), (-(8 + len(encoded)) % 4 + 1, False)):
        join(path, encoded + b" " * spaces, data, align=False)
        if sound:
            open_fleet(path)
        else:
            with pytest.raises(AdapterFormatError, match="its numbers do not begin at a multiple of 4 bytes"):
                open_fleet(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 10**9, 50_000])
def test_a_header_longer_than_the_file_is_refused(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(AdapterFormatError, match="is not a whole fleet file; copy it again"):
        open_fleet(path)


def test_no_part_of_a_fleet_is_a_fleet(path: Path) -> None:
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for end in [*range(16), *range(16, begin, 37), begin - 1, *range(begin, len(content), 101), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(AdapterFormatError):
            open_fleet(path)


def test_a_flipped_bit_of_the_header_never_ends_in_another_error(path: Path) -> None:
    """Most are refused; those in a label or a method name are read as what they say."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for place in range(begin):
            os.pwrite(file.fileno(), bytes([content[place] ^ 1 << (place % 8)]), place)
            try:
                fleet = open_fleet(path)
            except DeployfaError:
                refused += 1
            else:
                assert fleet.data_bytes == len(content) - begin and len(fleet) == N
            os.pwrite(file.fileno(), content[place : place + 1], place)
    assert path.read_bytes() == content and begin // 2 < refused < begin


def test_no_such_fleet(tmp_path: Path) -> None:
    for path in (tmp_path / "none.fleet", tmp_path):
        with pytest.raises(InputError, match=r"no fleet at '.*'; pass a file that AdapterTable.save wrote"):
            open_fleet(path)


def test_a_file_without_the_right_to_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # the tests may run as root, who may read everything
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(InputError, match=r"cannot read '.*' \(Permission denied\); pass a file that you may read"):
        open_fleet(path)


# numbers that are none


def poke(path: Path, tensor: str, row: int, value: float, at: int = -1) -> Fleet:
    """Write one number of one row into the file, behind the back of the header; opens what that gives."""
    fleet = open_fleet(path)
    with path.open("r+b") as file:
        array = np.memmap(file, "<f4", "r+", fleet.starts[tensor], fleet.arrays[tensor].shape)
        array[row].flat[at] = value
        array.flush()
    return open_fleet(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", [LAMBDA, "adapter/q/A", "adapter/up/out_B", "adapter/classifier/weight"])
@pytest.mark.parametrize("row", [1, N - 1])
def test_a_number_that_is_not_finite_is_refused(path: Path, tensor: str, row: int, value: float) -> None:
    fleet = poke(path, tensor, row, value)
    with pytest.raises(AdapterFormatError) as caught:
        AdapterTable.from_fleet(fleet)
    assert str(caught.value) == (
        f"'{path}': '{tensor}' of adapter '{MEMBERS[row]}' holds NaN or infinity; write the fleet again without it"
    )


@pytest.mark.parametrize(
    ("row", "at", "value"),
    # the first row has two labels of four, the last one three
    [(1, 3, np.nan), (1, 3, np.inf), (1, 3, 0.5), (1, 0, -np.inf), (N - 1, 1, -np.inf), (N - 1, 0, np.nan)],
)
def test_a_bias_is_masked_at_its_end_only(path: Path, row: int, at: int, value: float) -> None:
    fleet = poke(path, "adapter/classifier/bias", row, value, at)
    with pytest.raises(AdapterFormatError, match=f"bias' of adapter '{MEMBERS[row]}' holds NaN or infinity"):
        AdapterTable.from_fleet(fleet)


def test_the_bad_row_is_found_behind_many_blocks(
    layout: Layout, base: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployfa.tables.fleet._BLOCK_BYTES", 7 * layout.row_bytes)
    write_fleet(tmp_path / "x.fleet", layout, members(100), vefa_rows(layout, base, 100))
    wanted = {member.name: row for member, row in zip(members(100), vefa_rows(layout, base, 100), strict=True)}
    assert_holds(AdapterTable.from_fleet(open_fleet(tmp_path / "x.fleet")), wanted)
    fleet = poke(tmp_path / "x.fleet", "adapter/k/B", 83, np.nan, 0)
    with pytest.raises(AdapterFormatError, match=r"'adapter/k/B' of adapter 'n83' holds NaN"):
        AdapterTable.from_fleet(fleet)


@pytest.mark.parametrize("tensor", [LAMBDA, "adapter/k/B", "adapter/up/out_A"])
def test_a_base_that_is_an_adapter_is_refused(path: Path, tensor: str) -> None:
    fleet = poke(path, tensor, 0, 0.5)
    with pytest.raises(AdapterFormatError, match=f"'{tensor}' of the base's row is not zero"):
        AdapterTable.from_fleet(fleet)


def test_a_file_that_was_changed_meanwhile_is_not_read(path: Path, table: AdapterTable) -> None:
    fleet = open_fleet(path)
    other = AdapterTable.from_fleet(fleet)
    assert len(other) == N
    table.remove("vefa")
    time.sleep(0.01)
    table.save(path, force=True)
    # what was mapped before stays as it was: the old file lives on without a name
    assert len(fleet.arrays[LAMBDA]) == N
    with pytest.raises(InputError, match=r"' was changed since it was opened; open it again"):
        AdapterTable.from_fleet(fleet)
    path.unlink()
    with pytest.raises(InputError, match="no fleet at"):
        fleet.read_into(LAMBDA, np.empty((N, 13), np.float32))


# large ones


def test_ten_thousand_adapters(layout: Layout, base: Row, tmp_path: Path) -> None:
    count = 10_001
    rows = [row_of(make_adapter("mixture", seed), layout, base) for seed in range(50)]
    path = tmp_path / "many.fleet"
    write_fleet(path, layout, members(count), (rows[number % 50] if number else base for number in range(count)))
    table = AdapterTable.from_fleet(open_fleet(path))
    assert len(table) == count and table.memory_bytes == count * layout.row_bytes
    with table.snapshot() as lease:
        for tensor, array in lease.arrays.items():
            stacked = np.stack([row[tensor] for row in rows])
            np.testing.assert_array_equal(array[1:], stacked[np.arange(1, count) % 50])
        assert lease.rows(["n9999", "base", "n1"]).tolist() == [9999, 0, 1]


MEASURE = """
    import sys, psutil
    from pathlib import Path
    import numpy as np
    from deployfa.tables import *
    WIDTH, COUNT = 20_000, 2_501      # 200 MB
    layout = Layout(
        fingerprints=["sha256:a"],
        vectors=[
            Vectors(part=part, segments=[Segment(site="s", start=0, stop=WIDTH // 2)]) for part in ("lambda", "delta")
        ],
        low_ranks=[],
        heads=[Head(site="head", in_features=3, out_features=2)],
    )
    def resident(): return psutil.Process().memory_info().rss
    before = resident()
    if sys.argv[1] == "write":
        base = base_row(layout, {"head": (np.ones((2, 3), np.float32), None)})
        peak = 0
        def rows():
            global peak
            yield base
            for number in range(1, COUNT):
                peak = max(peak, resident())
                yield base | {"adapter/lambda": np.full(WIDTH // 2, number, np.float32)}
        members = [Member(name="base", method="base")] + [Member(name=f"n{i}", method="vefa") for i in range(1, COUNT)]
        write_fleet(Path(sys.argv[2]), layout, members, rows())
        print(max(peak, resident()) - before, COUNT * layout.row_bytes)
    else:
        fleet = open_fleet(sys.argv[2])
        table = AdapterTable.from_fleet(fleet)
        after = resident()
        with table.snapshot() as lease:
            assert (lease.arrays["adapter/lambda"] == np.arange(COUNT, dtype=np.float32)[:, None]).all()
        print(after - before, fleet.data_bytes)
"""


def measured(what: str, path: Path) -> tuple[int, int]:
    """Bytes that became resident, and bytes of numbers."""
    code = textwrap.dedent(MEASURE)
    done = subprocess.run([sys.executable, "-c", code, what, path], capture_output=True, text=True, check=True)
    resident, numbers = map(int, done.stdout.split())
    return resident, numbers


def test_memory_of_a_large_fleet(tmp_path: Path) -> None:
    """Writing holds some rows and not all; a table of them takes their bytes and at most a tenth more."""
    path = tmp_path / "large.fleet"
    resident, numbers = measured("write", path)
    assert numbers > 200_000_000 and path.stat().st_size > numbers
    # one block of rows, and what 2,500 names take
    assert resident < 32 << 20
    resident, numbers = measured("load", path)
    assert numbers <= resident <= 1.1 * numbers


def test_a_fleet_is_of_one_layout(path: Path) -> None:
    """Who serves a bundle compares its layout with the fleet's; they must not come out equal by accident."""
    assert open_fleet(path).layout == make_layout()
    assert open_fleet(path).layout != make_layout(fingerprints=["sha256:other"])
    assert base_row(open_fleet(path).layout, {HEAD: base_head()}).keys() == open_fleet(path).starts.keys()
