"""Outputs → the protocol's answer: JSON, and behind it what was asked for as bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from deployfa.edits import Array
from deployfa.errors import RequestError
from deployfa.serving.datatypes import datatype_of
from deployfa.serving.request import WantedOutput

__all__ = ["encode_response"]

_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.json.Encoder()


class _Output(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class _Response(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str
    id: str = ""
    parameters: dict[str, Any] | None = None
    outputs: list[_Output] = []


def encode_response(
    model: str,
    version: str,
    request_id: str,
    outputs: Mapping[str, Array],
    wanted: Sequence[WantedOutput],
    *,
    adapter: str = "",
    labels: Sequence[str] = (),
) -> tuple[list[bytes], int | None]:
    """The body in pieces, and the length of its JSON part if binary tensors follow.

    JSON has no NaN and no infinity: they are ``null`` there, and themselves in binary.
    """
    shown: list[_Output] = []
    pieces: list[bytes] = [b""]
    for each in wanted:
        array = outputs[each.name]
        if each.classes:
            array = _classes(each, array, labels)
        datatype = datatype_of(array.dtype)
        if each.binary:
            content = _binary(array)
            pieces.append(content)
            shown.append(_Output(each.name, datatype, list(array.shape), {"binary_data_size": len(content)}))
        else:
            shown.append(_Output(each.name, datatype, list(array.shape), None, _listed(each.name, array)))
    response = _Response(model, version, request_id, {"adapter": adapter} if adapter else None, shown)
    pieces[0] = _ENCODER.encode(response)
    return pieces, len(pieces[0]) if len(pieces) > 1 else None


def _binary(array: Array) -> bytes:
    if array.dtype.kind != "O":
        return array.tobytes()
    return b"".join(_LENGTH.pack(len(value)) + value for value in map(_bytes, array.reshape(-1)))


def _listed(name: str, array: Array) -> list[Any]:
    if array.dtype.kind == "O":
        try:
            return [_bytes(value).decode("utf-8") for value in array.reshape(-1)]
        except UnicodeDecodeError as error:
            raise RequestError(f"output '{name}' holds bytes that are no text; ask for it as binary data") from error
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    values: list[Any] = array.reshape(-1).tolist()
    return values


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _classes(wanted: WantedOutput, array: Array, labels: Sequence[str]) -> Array:
    """The ``classes`` largest of each row as ``value:index:label``, as Triton's extension writes them."""
    if array.dtype.kind != "f" or array.ndim != 2:
        raise RequestError(f"output '{wanted.name}' has no classes; ask for it without 'classification'")
    count = min(wanted.classes, array.shape[1])
    order = np.argsort(-array, axis=1, kind="stable")[:, :count]
    found = np.empty((len(array), count), object)
    for row, indices in enumerate(order):
        for place, index in enumerate(indices):
            label = f":{labels[index]}" if index < len(labels) else ""
            found[row, place] = f"{array[row, index]:f}:{index}{label}".encode()
    return found
