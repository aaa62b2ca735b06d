"""Read a ``torch.save`` file without torch, and without executing anything in it.

A device that applies an adapter has no torch, yet people hold ``vefa.pt``.  The format is a zip with a pickle of the
structure and one raw file per storage.  The unpickler below knows tensors and plain containers and refuses every other
name, as ``torch.load(weights_only=True)`` does (torch/_weights_only_unpickler.py); a test compares the two.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deployfa.edits import Array
from deployfa.errors import AdapterFormatError

__all__ = ["read_torch_zip"]

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "BoolStorage": np.dtype(np.bool_),
}
_MAX_PICKLE_BYTES = 256 << 20
_MAX_VALUES = 1_000_000


def read_torch_zip(path: Path) -> Any:
    """The object in ``path``, its tensors as numpy arrays.

    Raises ``AdapterFormatError`` for a truncated file, a legacy (non-zip) pickle, or a pickle that asks for anything
    but tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path)
    except AdapterFormatError:
        raise
    except zipfile.BadZipFile as error:
        raise AdapterFormatError(f"'{path}' is not a torch file, or is truncated ({error}); copy it again") from error
    except Exception as error:
        # zipfile fails in many ways on damaged headers: struct.error, NotImplementedError, OverflowError, OSError …
        raise AdapterFormatError(f"'{path}' is damaged ({type(error).__name__}: {error}); copy it again") from error


def _read(archive: zipfile.ZipFile, path: Path) -> Any:
    if len(set(archive.namelist())) != len(archive.namelist()):
        raise AdapterFormatError(f"'{path}' holds two members of one name, which torch never writes; refused")
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise AdapterFormatError(f"'{path}' is a zip but not a torch file; pass the file that training wrote")
    root = pickles[0].removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise AdapterFormatError(f"'{path}' has compressed members, which torch never writes; refused")
    order = f"{root}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise AdapterFormatError(f"'{path}' was written on a big-endian machine; save it again on a little-endian one")
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
        raise AdapterFormatError(f"'{path}' has a structure of over {_MAX_PICKLE_BYTES >> 20} MiB; refused")
    try:
        return _Plain().copy(_TensorUnpickler(io.BytesIO(archive.read(pickles[0])), archive, root).load())
    except AdapterFormatError as error:
        raise AdapterFormatError(f"'{path}': {error}") from error
    except zipfile.BadZipFile as error:
        raise AdapterFormatError(f"'{path}' is damaged ({error}); copy it again") from error
    except Exception as error:
        # a hostile or damaged pickle can fail in any way; none of them is ours to pass on
        raise AdapterFormatError(f"'{path}' is damaged ({type(error).__name__}: {error}); copy it again") from error


class _Plain:
    """Copies what was unpickled into plain containers, so that nothing a pickle can attach to an object survives.

    Counts as it goes: a list that holds itself, or lists that share each other a thousand million times, end here.
    """

    def __init__(self) -> None:
        self._left = _MAX_VALUES

    def copy(self, value: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise AdapterFormatError(f"it holds more than {_MAX_VALUES} values; refused")
        if value is None or type(value) in {str, int, float, bool, np.ndarray}:
            return value
        if isinstance(value, dict):
            return {self._key(key): self.copy(item) for key, item in dict.items(value)}
        if type(value) in {list, tuple}:
            return type(value)(self.copy(item) for item in value)
        raise AdapterFormatError(f"it holds a {type(value).__name__}; adapters are tensors and plain values")

    @staticmethod
    def _key(key: Any) -> str:
        if type(key) is not str:
            raise AdapterFormatError(f"it has a key of type {type(key).__name__}; expected text")
        return key


class _Storage:
    """A storage's dtype and element count, before its bytes are read."""

    def __init__(self, data: Array) -> None:
        self.data = data


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream)
        self._archive = archive
        self._root = root
        self._storages: dict[tuple[str, str], _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild(_rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Rebuild(_rebuild_parameter)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in {"torch", "torch.storage"} and name in _STORAGES:
            return name
        raise AdapterFormatError(
            f"the file asks to run '{module}.{name}', and adapters are data, never code; "
            "do not load this file with anything else either unless you trust who made it"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, count = pid
        if kind != "storage" or storage_type not in _STORAGES or not str(key).isdigit():
            raise AdapterFormatError(f"unknown storage {storage_type!r}")
        if (key, storage_type) in self._storages:
            return self._storages[key, storage_type]
        dtype = _STORAGES[storage_type]
        raw = self._archive.read(f"{self._root}data/{key}")
        if len(raw) != int(count) * dtype.itemsize:
            raise AdapterFormatError(f"storage {key} has {len(raw)} bytes, expected {int(count) * dtype.itemsize}")
        storage = self._storages[key, storage_type] = _Storage(np.frombuffer(raw, dtype=dtype))
        return storage


class _Rebuild:
    """Calls one function.  A pickle may set attributes on what it got by name; on this object it cannot."""

    __slots__ = ("_function",)
    _function: Callable[..., Array]

    def __init__(self, function: Callable[..., Array]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Array:
        return self._function(*arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise AdapterFormatError("the file asks to change a function, and adapters are data, never code")


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Array:
    """``torch._utils._rebuild_tensor_v2`` for a CPU copy, checked against the storage's length."""
    data = storage.data
    if offset < 0 or any(n < 0 for n in size) or any(s < 0 for s in stride) or len(size) != len(stride):
        raise AdapterFormatError("a tensor has a negative size, stride or offset")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and last >= data.size:
        raise AdapterFormatError("a tensor reaches past the end of its storage")
    item = data.itemsize
    if math.prod(size) > data.size:
        raise AdapterFormatError("a tensor is larger than its storage")
    view = np.lib.stride_tricks.as_strided(data[offset:], shape=size, strides=[s * item for s in stride])
    return np.ascontiguousarray(view).reshape(size)


def _rebuild_parameter(data: Array, *_: Any) -> Array:
    return data
