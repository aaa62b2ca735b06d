"""ONNX Runtime's own adapter file, ``.onnx_adapter``: one row for the slots of one graph.

The file is a flatbuffer that any ONNX Runtime (C, C++, C#, Java, Python) hands to a run with
``RunOptions.add_active_adapter``.  It holds the tensors of the row, and ``adapter_active`` where the graph has an idle
branch; ``adapter_strength`` is left to the caller.  Its two version numbers, which the runtime leaves to us, say

- ``model_version``: what it fits, the first 31 bits of the sha256 of the layout, the base's fingerprints included;
- ``adapter_version``: what it holds, the low 31 bits of a CRC-32 of every tensor, so that a damaged file is noticed.

What its answers mean is a tensor too, ``adapter_labels``, which the graph must take and no operator reads (see
``deployfa.graph.row_labels``): the format has no place for a text, and the runtime refuses what is no input.

Source: https://onnxruntime.ai/docs/genai/tutorials/finetune.html and
``onnxruntime/lora/adapter_format/adapter_schema.fbs`` in ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deployfa.atomic import write_file
from deployfa.edits import Array
from deployfa.errors import AdapterFormatError, BaseMismatchError, EditError, InputError, MissingExtraError
from deployfa.tables import Layout
from deployfa.tables.checks import check_row
from deployfa.tables.label_bytes import label_bytes, read_label_bytes
from deployfa.tables.layout import ACTIVE, LABELS

__all__ = ["SUFFIX", "model_version", "read_labelled", "read_onnx_adapter", "write_onnx_adapter"]

SUFFIX = ".onnx_adapter"
_BITS = 0x7FFFFFFF  # the format has signed integers


def write_onnx_adapter(
    path: Path,
    row: Mapping[str, Array],
    layout: Layout,
    *,
    idle_branch: bool,
    labels: Sequence[str] = (),
    force: bool = False,
) -> None:
    """Write ``row`` to ``path``, whole or not at all; the same row gives the same bytes.

    idle_branch: whether the graph has one, which the adapter must then switch off.  labels: what the answers mean, for
    a graph that takes ``adapter_labels`` only.  Raises ``EditError`` if ``row`` is
    none of ``layout``, ``MissingExtraError`` without onnxruntime.
    """
    ort = _import_onnxruntime()
    check_row(layout, row)
    tensors = {name: np.ascontiguousarray(row[name]) for name in sorted(row)}
    if idle_branch:
        tensors[ACTIVE] = np.ones(1, np.float32)
    if labels:
        tensors[LABELS] = label_bytes(labels)
    file = ort.AdapterFormat()
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    file.set_model_version(model_version(layout))
    file.set_adapter_version(_content(tensors))
    with write_file(path, force=force) as partial:
        file.export_adapter(str(partial))


def read_onnx_adapter(path: Path, layout: Layout, *, idle_branch: bool) -> dict[str, Array]:
    """The row in ``path``, copied out of the file; raises what ``read_labelled`` raises."""
    return read_labelled(path, layout, idle_branch=idle_branch)[0]


def read_labelled(path: Path, layout: Layout, *, idle_branch: bool) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The row in ``path``, copied out of the file, and what its answers mean, empty if it does not say.

    Raises ``InputError`` if there is no such file, ``AdapterFormatError`` if it is no such file or a damaged one, and
    ``BaseMismatchError`` if it was made for another base or another set of slots.
    """
    ort = _import_onnxruntime()
    if not path.is_file():
        raise InputError(f"no file '{path}'; make one with: deployfa convert ADAPTER --to onnx-adapter --bundle BUNDLE")
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        # what it gives are views of a mapped file
        tensors = {name: np.array(value.numpy()) for name, value in file.get_parameters().items()}
        fits, holds = file.get_model_version(), file.get_adapter_version()
    except Exception as error:  # its exceptions share no base class
        raise AdapterFormatError(
            f"'{path}' is not an {SUFFIX} file, or a damaged one; convert the adapter again"
        ) from error
    if fits != model_version(layout):
        raise BaseMismatchError(
            f"'{path}' was made for another bundle (its model version is {fits}, this one's {model_version(layout)}); "
            "convert the adapter again with --bundle this one"
        )
    if holds != _content(tensors):
        raise AdapterFormatError(f"'{path}' is damaged: its numbers are not those that were written; copy it again")
    active = tensors.pop(ACTIVE, None)
    if (active is not None) != idle_branch or (active is not None and not _is_on(active)):
        raise AdapterFormatError(f"'{path}' does not switch itself on as this bundle's slots want it; convert it again")
    named = tensors.pop(LABELS, None)
    try:
        check_row(layout, tensors)
        labels = () if named is None else read_label_bytes(named)
    except (AdapterFormatError, EditError) as error:
        raise AdapterFormatError(f"'{path}': {error}") from error
    return tensors, labels


def model_version(layout: Layout) -> int:
    """What a file must say to fit ``layout``, in [0, 2³¹)."""
    digest = hashlib.sha256(msgspec.json.encode(layout, order="deterministic")).digest()
    return int.from_bytes(digest[:4], "big") & _BITS


def _content(tensors: Mapping[str, Array]) -> int:
    crc = 0
    for name in sorted(tensors):
        array = tensors[name]
        crc = zlib.crc32(f"{name}\0{array.dtype.str}{[*array.shape]}\0".encode(), crc)
        crc = zlib.crc32(array.tobytes(), crc)
    return crc & _BITS


def _is_on(active: Array) -> bool:
    return active.dtype == np.float32 and active.shape == (1,) and float(active[0]) == 1.0


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu", f"reading and writing {SUFFIX} files") from error
    return onnxruntime
