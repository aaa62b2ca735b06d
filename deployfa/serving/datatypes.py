"""The protocol's names of element types.

Source: https://kserve.github.io/website/latest/modelserving/data_plane/v2_protocol/#tensor-data-types
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["BYTES", "DATATYPES", "datatype_of"]

BYTES = "BYTES"

#: datatype → the numpy dtype of its binary form, little-endian; BYTES has none.
DATATYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype.name: name for name, dtype in DATATYPES.items()}


def datatype_of(dtype: npt.DTypeLike | str) -> str:
    """``float32`` → ``FP32``; strings and objects are ``BYTES``."""
    if isinstance(dtype, str):
        return _NAMES.get(dtype, BYTES)
    return _NAMES.get(np.dtype(dtype).name, BYTES)
