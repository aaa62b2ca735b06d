"""Names of labels as a tensor: (n,), uint8, a JSON list of texts in UTF-8."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from deployfa.edits import Array
from deployfa.errors import AdapterFormatError

__all__ = ["label_bytes", "read_label_bytes"]


def label_bytes(labels: Sequence[str]) -> Array:
    """The inverse of ``read_label_bytes``."""
    return np.frombuffer(msgspec.json.encode(list(labels)), np.uint8).copy()


def read_label_bytes(array: Array) -> tuple[str, ...]:
    """Raises ``AdapterFormatError`` if ``array`` is no list of texts."""
    try:
        if array.dtype != np.uint8 or array.ndim != 1:
            raise ValueError(f"{array.dtype} {array.shape}")
        return tuple(msgspec.json.decode(array.tobytes(), type=list[str]))
    except ValueError as error:  # msgspec's own, and what is not UTF-8, are ValueErrors too
        raise AdapterFormatError(f"its names of labels are no list of texts ({error}); convert it again") from error
