"""One tensor of a request: from JSON or from bytes, checked against its own shape and datatype."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from deployfa.edits import Array
from deployfa.errors import RequestError
from deployfa.serving.datatypes import BYTES, DATATYPES
from deployfa.serving.limits import IMAGE, Limits

__all__ = ["bytes_tensor", "from_binary", "from_json"]

_FLAT: dict[str, Any] = {
    "b": msgspec.json.Decoder(list[bool]),
    "i": msgspec.json.Decoder(list[int]),
    "u": msgspec.json.Decoder(list[int]),
    "f": msgspec.json.Decoder(list[float]),
    "V": msgspec.json.Decoder(list[float]),
    BYTES: msgspec.json.Decoder(list[str]),
}
_ANY = msgspec.json.Decoder()
_LENGTH = struct.Struct("<I")


def from_json(
    name: str,
    datatype: str,
    shape: Sequence[int],
    count: int,
    data: msgspec.Raw | msgspec.UnsetType,
    limits: Limits,
) -> Array:
    """``data``: a flat list in row-major order, or lists in lists; ``count``: the product of ``shape``."""
    dtype = _dtype(name, datatype)
    if data is msgspec.UNSET:
        raise RequestError(f"input '{name[:80]}' has no data; send 'data', or binary_data_size and its bytes")
    if datatype in ("FP16", "BF16"):
        raise RequestError(f"input '{name[:80]}' is {datatype}, which JSON has no numbers for; send it as binary data")
    values = _flat(name, bytes(data), BYTES if dtype is None else dtype.kind, datatype, limits)
    if len(values) != count:
        raise RequestError(f"input '{name[:80]}' has {len(values)} elements for shape {list(shape)}; send {count}")
    if dtype is None:
        texts = np.empty(count, object)
        texts[:] = [_checked_text(name, value.encode("utf-8", "surrogatepass"), limits) for value in values]
        return texts.reshape(shape)
    try:
        with np.errstate(over="ignore"):  # what overflows is infinite then, and refused
            array = np.array(values, dtype)
    except (OverflowError, ValueError, TypeError) as error:
        raise RequestError(
            f"input '{name[:80]}' holds a number that is no {datatype}; send another datatype"
        ) from error
    return _finite(name, array).reshape(shape)


def from_binary(
    name: str, datatype: str, shape: Sequence[int], count: int, content: memoryview, limits: Limits
) -> Array:
    """``content``: the tensor's bytes, little-endian; the array may be a view of them, unaligned, read-only."""
    dtype = _dtype(name, datatype)
    if dtype is None:
        return bytes_tensor(name, content, count, limits).reshape(shape)
    if len(content) != count * dtype.itemsize:
        raise RequestError(
            f"input '{name[:80]}' has {len(content)} bytes for {datatype} of shape {list(shape)}; "
            f"send {count * dtype.itemsize}"
        )
    if dtype.kind == "b":
        # any byte is a bool to numpy, and 2 is not equal to True
        flags: Array = np.frombuffer(content, np.uint8) != 0
        return flags.reshape(shape)
    return _finite(name, np.frombuffer(content, dtype)).reshape(shape)


def bytes_tensor(name: str, content: memoryview, count: int, limits: Limits) -> Array:
    """``count`` elements, each its length as 4 bytes, little-endian, and then as many bytes."""
    if count * _LENGTH.size > len(content):
        # before there is room made for them
        raise RequestError(
            f"input '{name[:80]}' has {len(content)} bytes, too few for {count} elements; send each with its length"
        )
    found = np.empty(count, object)
    offset = 0
    for number in range(count):
        if len(content) - offset < _LENGTH.size:
            raise RequestError(f"input '{name[:80]}' ends before element {number} of {count}; send all of them")
        (length,) = _LENGTH.unpack_from(content, offset)
        offset += _LENGTH.size
        if length > len(content) - offset:
            raise RequestError(
                f"input '{name[:80]}': element {number} is said to have {length} bytes, which are not there"
            )
        found[number] = _checked_text(name, bytes(content[offset : offset + length]), limits)
        offset += length
    if offset != len(content):
        raise RequestError(
            f"input '{name[:80]}' has {len(content) - offset} bytes behind its {count} elements; send none"
        )
    return found


def _dtype(name: str, datatype: str) -> np.dtype | None:
    if datatype == BYTES:
        return None
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        known = ", ".join((*DATATYPES, BYTES))
        raise RequestError(f"input '{name[:80]}' has datatype '{datatype[:40]}'; there are: {known}")
    return dtype


def _flat(name: str, data: bytes, kind: str, datatype: str, limits: Limits) -> list[Any]:
    try:
        values: list[Any] = _FLAT[kind].decode(data)
        return values
    except msgspec.ValidationError:
        pass  # lists in lists, or wrong elements
    except RecursionError as error:
        raise RequestError(f"input '{name[:80]}' is nested too deeply; send a flat list") from error
    try:
        level: Any = _ANY.decode(data)
    except RecursionError as error:
        raise RequestError(f"input '{name[:80]}' is nested too deeply; send a flat list") from error
    except msgspec.MsgspecError as error:
        # a number such as 1e999 is JSON, and no number that there is
        raise RequestError(f"input '{name[:80]}' is not a list of {datatype}: {str(error)[:120]}") from error
    for _ in range(limits.dimensions):
        if not isinstance(level, list) or not level or not all(isinstance(each, list) for each in level):
            break
        level = [value for each in level for value in each]
    try:
        flat: list[Any] = msgspec.convert(level, _FLAT[kind].type)
        return flat
    except (msgspec.ValidationError, RecursionError) as error:
        raise RequestError(f"input '{name[:80]}' is not a list of {datatype}: {str(error)[:120]}") from error


def _finite(name: str, array: Array) -> Array:
    """Only finite numbers: one NaN in a batch says nothing of its neighbours, but it is no question either."""
    if array.dtype.kind in "fV" and not np.isfinite(array).all():
        raise RequestError(f"input '{name[:80]}' holds NaN or infinity; send finite numbers")
    return array


def _checked_text(name: str, value: bytes, limits: Limits) -> bytes:
    most = limits.picture_bytes if name == IMAGE else limits.text_bytes
    if len(value) > most:
        raise RequestError(f"input '{name[:80]}' has an element of {len(value):,} bytes; send {most:,} at most", 413)
    return value
