"""safetensors to and from numpy, bfloat16 included (``safetensors.numpy`` refuses it)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import safetensors

from deployfa.edits import Array
from deployfa.errors import AdapterFormatError

__all__ = ["read_safetensors", "write_safetensors"]

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}


def read_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and header metadata of ``path``; raises ``AdapterFormatError`` if it is not a whole safetensors file."""
    try:
        content = path.read_bytes()
        with safetensors.safe_open(path, framework="numpy") as handle:
            header = handle.metadata() or {}
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise AdapterFormatError(f"'{path}' is not a whole safetensors file ({error}); copy it again") from error
    tensors: dict[str, Array] = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise AdapterFormatError(f"'{path}': tensor '{name}' has dtype {entry['dtype']}; expected floating point")
        tensors[name] = np.frombuffer(entry["data"], dtype=dtype).reshape(entry["shape"])
    return tensors, header


def write_safetensors(path: Path, tensors: Mapping[str, Array], header: Mapping[str, str]) -> None:
    """Write ``tensors`` and ``header`` to ``path`` (not atomic: the caller writes aside)."""
    kept = {name: _little_endian(array) for name, array in sorted(tensors.items())}
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in kept.items()
    }
    written = safetensors.serialize(specs, metadata=dict(header))
    # safetensors writes the metadata in the order of a randomly seeded hash table: the same adapter, the same bytes
    start = 8 + int.from_bytes(written[:8], "little")
    ordered = msgspec.json.encode(msgspec.json.decode(written[8:start]), order="sorted")
    ordered += b" " * (-len(ordered) % 8)
    path.write_bytes(len(ordered).to_bytes(8, "little") + ordered + written[start:])


def _little_endian(array: Array) -> Array:
    """C-contiguous and in the byte order that the format has, whatever the caller's is; 0-d stays 0-d."""
    ordered = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(ordered).reshape(array.shape)
