"""The three forms of an adapter file, and how to tell them apart: by content first, by name for a clear message."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deployfa.adapter import peft_directory
from deployfa.adapter.adapter import FORMAT, Adapter, AdapterMeta
from deployfa.adapter.safetensors_io import read_safetensors, write_safetensors
from deployfa.adapter.torch_zip import read_torch_zip
from deployfa.atomic import check_output, write_directory, write_file
from deployfa.edits import Array
from deployfa.errors import AdapterFormatError, InputError, MissingExtraError

__all__ = ["load", "save"]


def load(path: Path) -> Adapter:
    """Dispatch on what is at ``path``."""
    if path.is_dir():
        return peft_directory.load(path)
    if path.stat().st_size == 0:
        raise AdapterFormatError(f"'{path}' is empty; copy the adapter again")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"PK\x03\x04" or path.suffix in {".pt", ".pth", ".bin"}:
        return _load_pt(path)
    return _load_safetensors(path)


def save(adapter: Adapter, path: Path, *, force: bool) -> None:
    """Dispatch on the suffix of ``path``."""
    if path.suffix == ".safetensors":
        header = {"format": FORMAT, "meta": msgspec.json.encode(adapter.meta, order="sorted").decode()}
        with write_file(path, force=force) as partial:
            write_safetensors(partial, adapter.tensors(), header)
    elif path.suffix == ".pt":
        check_output(path, force=force)
        _save_pt(adapter, path, force=force)
    elif path.suffix == "":
        with write_directory(path, force=force) as partial:
            peft_directory.save(adapter, partial)
    else:
        raise InputError(f"cannot write an adapter as '{path.suffix}'; use .pt, .safetensors, or a directory")


def _load_pt(path: Path) -> Adapter:
    content = read_torch_zip(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise AdapterFormatError(
            f"'{path}' is a torch file but not a deployfa adapter; for a PEFT checkpoint pass its directory"
        )
    tensors = content.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(array, np.ndarray) for array in tensors.values()):
        raise AdapterFormatError(f"'{path}' has no tensors, or something else among them; export the adapter again")
    return Adapter.from_tensors(tensors, _meta(content.get("meta"), path), found="deployfa .pt file")


def _load_safetensors(path: Path) -> Adapter:
    tensors, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise AdapterFormatError(
            f"'{path}' is a safetensors file but not a deployfa adapter; for a PEFT checkpoint pass its directory"
        )
    try:
        meta = msgspec.json.decode(header.get("meta", ""))
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"'{path}' has a broken header ({error}); copy the adapter again") from error
    return Adapter.from_tensors(tensors, _meta(meta, path), found="deployfa .safetensors file")


def _meta(raw: Any, path: Path) -> AdapterMeta:
    try:
        return msgspec.convert(raw, AdapterMeta)
    except msgspec.ValidationError as error:
        raise AdapterFormatError(f"'{path}' has broken metadata ({error}); written by another version?") from error


def _save_pt(adapter: Adapter, path: Path, *, force: bool) -> None:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "torch", "train", f"writing '{path.name}' (a .safetensors file needs no torch)"
        ) from error

    tensors: Mapping[str, Array] = adapter.tensors()
    content = {
        "format": FORMAT,
        "meta": msgspec.to_builtins(adapter.meta),
        "tensors": {name: _to_torch(array) for name, array in tensors.items()},
    }
    # through memory: torch's own file writer reports a full disk as something else, and puts the file's name inside
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with write_file(path, force=force) as partial:
        partial.write_bytes(buffer.getbuffer())


def _to_torch(array: Array) -> Any:
    import torch

    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(contiguous.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(contiguous.copy())
