"""Names of labels as bytes: any text goes in and comes out, and what is no list of texts is refused."""

from __future__ import annotations

import numpy as np
import pytest

from deployfa.errors import AdapterFormatError
from deployfa.tables.label_bytes import label_bytes, read_label_bytes


@pytest.mark.parametrize("labels", [(), ("negative", "positive"), ('"', "", "schön ☃", "a\nb", "\0")])
def test_what_was_written_is_read(labels: tuple[str, ...]) -> None:
    array = label_bytes(labels)
    assert array.dtype == np.uint8 and array.ndim == 1 and array.size
    assert read_label_bytes(array) == labels


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(0, np.uint8),
        np.frombuffer(b"[1, 2]", np.uint8),
        np.frombuffer(b'"text"', np.uint8),
        np.frombuffer(b'["a"', np.uint8),
        np.frombuffer(b'["\xff"]', np.uint8),
        np.zeros(4, np.float32),
        np.frombuffer(b'["a"]', np.uint8)[None],
    ],
)
def test_what_is_no_list_of_texts_is_refused(array: np.ndarray) -> None:
    with pytest.raises(AdapterFormatError, match="its names of labels are no list of texts"):
        read_label_bytes(array)
