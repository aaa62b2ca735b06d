"""A whole fleet in one file: a plain safetensors file of stacked rows, read by memory map.

Tensors as in the layout, each (N, *its shape in one row), float32; metadata: ``format``, ``layout`` and ``adapters`` as
JSON; row 0 is the base.  The header is padded with spaces so that the tensors begin at a multiple of 64 bytes.  Format:
https://huggingface.co/docs/safetensors, eight bytes for the header's length, the header as JSON, the tensors.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from deployfa.atomic import write_file
from deployfa.edits import Array
from deployfa.errors import AdapterFormatError, EditError, InputError
from deployfa.tables.checks import BASE, bad_row, check_base, check_layout, check_name, check_row, padded
from deployfa.tables.history import Member
from deployfa.tables.layout import Layout

__all__ = ["FLEET_FORMAT", "Fleet", "open_fleet", "write_fleet"]

FLEET_FORMAT = "deployfa-fleet/1"
_ALIGNMENT = 64
#: The safetensors library reads no longer header.
_MAX_HEADER_BYTES = 100_000_000
#: What is read or written at a time.
_BLOCK_BYTES = 8 << 20


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of a safetensors header; the offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Fleet:
    """An opened fleet file; its numbers are still on disk.  ``members[0]`` is the base; row i is ``members[i]``'s."""

    path: Path
    layout: Layout
    members: tuple[Member, ...]
    #: tensor → where it begins in the file
    starts: Mapping[str, int]
    #: device, inode, size and time of the last change of the file that was checked
    identity: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def data_bytes(self) -> int:
        return len(self) * self.layout.row_bytes

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Tensor → (N, *its shape in one row), read-only maps of the file: a page is read when it is first used.

        Not checked for NaN, which would read the file; ``AdapterTable.from_fleet`` does.  The file must not be written
        to while this is in use; deployfa replaces files whole, which is safe.
        """
        with self._open() as file:
            return {
                name: np.memmap(file, "<f4", "r", self.starts[name], (len(self), *shape))
                for name, shape in self.layout.shapes().items()
            }

    def base(self) -> dict[str, Array]:
        """Row 0, a copy; raises ``AdapterFormatError`` if it is anything but the model without an adapter."""
        row = {name: np.array(array[0], np.float32) for name, array in self.arrays.items()}
        try:
            check_base(self.layout, row)
        except EditError as error:
            raise AdapterFormatError(f"'{self.path}': {error}") from error
        return row

    def read_into(self, name: str, out: Array, *, first: int = 0) -> None:
        """Read rows of tensor ``name``, from ``first`` on, into ``out``, (n, *its shape in one row), float32.

        Raises ``AdapterFormatError`` at a number that is not finite, minus infinity for masked labels apart.
        """
        if not len(out):
            return
        masked = name in padded(self.layout)
        step = max(1, _BLOCK_BYTES // out[0].nbytes)
        with self._open() as file:
            file.seek(self.starts[name] + first * out[0].nbytes)
            for start in range(0, len(out), step):
                block = out[start : start + step]
                if file.readinto(block.data.cast("B")) != block.nbytes:
                    raise self._changed()
                bad = bad_row(block, padded=masked)
                if bad is not None:
                    owner = self.members[first + start + bad].name
                    raise AdapterFormatError(
                        f"'{self.path}': '{name}' of adapter '{owner}' holds NaN or infinity; write the fleet again "
                        "without it"
                    )

    def _open(self) -> io.BufferedReader:
        file = _open(self.path)
        if _identity(file) != self.identity:
            file.close()
            raise self._changed()
        return file

    def _changed(self) -> InputError:
        return InputError(f"'{self.path}' was changed since it was opened; open it again")


def write_fleet(
    path: Path, layout: Layout, members: Sequence[Member], rows: Iterable[Mapping[str, Array]], *, force: bool = False
) -> None:
    """Write the file, whole or not at all; ``rows`` are taken one after the other and never all held.

    members and rows: the base first, then the adapters, equally many.  Raises ``InputError`` on names that cannot be,
    and ``EditError`` on a row that is not one of the layout or not finite.
    """
    check_layout(layout)
    _check_members(members)
    count, shapes = len(members), layout.shapes()
    entries: dict[str, object] = {
        "__metadata__": {
            "format": FLEET_FORMAT,
            "layout": msgspec.json.encode(layout).decode(),
            "adapters": msgspec.json.encode(members).decode(),
        }
    }
    starts: dict[str, int] = {}
    size = 0
    for name, shape in shapes.items():
        starts[name], size = size, size + 4 * count * math.prod(shape)
        entries[name] = _Entry("F32", [count, *shape], (starts[name], size))
    header = msgspec.json.encode(entries)
    header += b" " * (-(8 + len(header)) % _ALIGNMENT)
    if len(header) > _MAX_HEADER_BYTES:
        raise InputError(
            f"{count} adapters need a header of {len(header) / 1e6:.0f} MB, and safetensors files end at "
            f"{_MAX_HEADER_BYTES / 1e6:.0f} MB; write several fleets"
        )
    with write_file(path, force=force) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        begin = file.tell()
        file.truncate(begin + size)
        _write_rows(file, begin, starts, layout, members, rows)


def _write_rows(
    file: io.BufferedWriter,
    begin: int,
    starts: Mapping[str, int],
    layout: Layout,
    members: Sequence[Member],
    rows: Iterable[Mapping[str, Array]],
) -> None:
    """Some rows at a time, because a tensor of all rows is one piece of the file."""
    shapes = layout.shapes()
    step = min(len(members), max(1, _BLOCK_BYTES // layout.row_bytes))
    block = {name: np.empty((step, *shape), "<f4") for name, shape in shapes.items()}
    done = held = 0
    for row in rows:
        number = done + held
        if number == len(members):
            raise InputError(f"there are more rows than the {len(members)} members; pass one member for each row")
        try:
            (check_row if number else check_base)(layout, row)
        except EditError as error:
            raise EditError(f"adapter '{members[number].name}': {error}") from error
        for name, array in block.items():
            array[held] = row[name]
        held += 1
        if held == step or number + 1 == len(members):
            for name, array in block.items():
                file.seek(begin + starts[name] + done * array[0].nbytes)
                file.write(array[:held].data.cast("B"))
            done, held = done + held, 0
    if done < len(members):
        raise InputError(f"there are {done + held} rows for {len(members)} members; pass one row for each member")


def open_fleet(path: str | Path) -> Fleet:
    """Read and check the header of ``path``; the numbers are read when they are used.

    Raises ``InputError`` if there is no such file and ``AdapterFormatError`` if it is no fleet, or not a whole one.
    """
    path = Path(path)
    with _open(path) as file:
        identity = _identity(file)
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise AdapterFormatError(f"'{path}' is not a whole fleet file; copy it again")
        header = file.read(length)
    try:
        layout, members, starts = _checked(header, size - 8 - length)
    except (AdapterFormatError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise AdapterFormatError(f"'{path}' is not a fleet file ({error}); copy it again, or write it anew") from error
    begin = 8 + length
    return Fleet(path, layout, members, {name: begin + start for name, start in starts.items()}, identity)


def _checked(header: bytes, data_bytes: int) -> tuple[Layout, tuple[Member, ...], dict[str, int]]:
    """Layout, members, and tensor → its start in the data, of a header that contradicts neither itself nor the file."""
    entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    metadata = msgspec.json.decode(entries.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
    if metadata.get("format") != FLEET_FORMAT:
        raise AdapterFormatError(f"its format is {metadata.get('format', 'unnamed')!r}, not {FLEET_FORMAT!r}")
    layout = msgspec.json.decode(metadata.get("layout", ""), type=Layout)
    members = msgspec.json.decode(metadata.get("adapters", ""), type=tuple[Member, ...])
    try:
        check_layout(layout)
        _check_members(members)
    except InputError as error:
        raise AdapterFormatError(str(error)) from error
    shapes = layout.shapes()
    if entries.keys() != shapes.keys():
        odd = min(entries.keys() ^ shapes.keys())
        raise AdapterFormatError(f"it {'lacks' if odd in shapes else 'has'} the tensor '{odd}', unlike its layout")
    tensors = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in entries.items()}
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        shape = [len(members), *shapes[name]]
        if tensor.dtype != "F32" or tensor.shape != shape:
            raise AdapterFormatError(f"'{name}' is {tensor.dtype} {tensor.shape}, its layout says F32 {shape}")
        if tensor.data_offsets != (at, at + 4 * math.prod(shape)):
            raise AdapterFormatError(
                f"'{name}' is at {tensor.data_offsets[0]}:{tensor.data_offsets[1]}, expected "
                f"{at}:{at + 4 * math.prod(shape)}"
            )
        at = tensor.data_offsets[1]
    if at != data_bytes:
        raise AdapterFormatError(f"it holds {data_bytes} bytes of numbers, its header says {at}")
    if (8 + len(header)) % 4:
        raise AdapterFormatError("its numbers do not begin at a multiple of 4 bytes")
    return layout, members, {name: tensor.data_offsets[0] for name, tensor in tensors.items()}


def _check_members(members: Sequence[Member]) -> None:
    """Raise ``InputError`` unless the first is the base and every other has a name of its own."""
    if not members or members[0].name != BASE:
        raise InputError(f"its first adapter is not '{BASE}'; row 0 is the model without an adapter")
    seen: set[str] = set()
    for member in members[1:]:
        check_name(member.name)
        if member.name in seen:
            raise InputError(f"adapter '{member.name}' is there twice; give each its own name")
        seen.add(member.name)


def _open(path: Path) -> io.BufferedReader:
    if not path.is_file():
        raise InputError(f"no fleet at '{path}'; pass a file that AdapterTable.save wrote")
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read '{path}' ({error.strerror}); pass a file that you may read") from error


def _identity(file: io.BufferedReader) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
