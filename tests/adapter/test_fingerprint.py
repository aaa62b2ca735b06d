"""The identity of a base: blind to order, to nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployfa.adapter import fingerprint

TENSORS = [
    ("a.weight", "float32", (2, 2), bytes(range(16))),
    ("b", "float16", (2,), b"abcd"),
    ("s", "int64", (), b"8" * 8),
]


@given(st.permutations(TENSORS))
def test_order_does_not_matter(tensors):
    assert fingerprint(tensors) == fingerprint(TENSORS)


def test_form():
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", fingerprint(TENSORS))


@given(st.integers(0, 15), st.integers(0, 7))
def test_one_bit_matters(byte, bit):
    data = bytearray(TENSORS[0][3])
    data[byte] ^= 1 << bit
    assert fingerprint([(*TENSORS[0][:3], bytes(data)), *TENSORS[1:]]) != fingerprint(TENSORS)


@pytest.mark.parametrize(
    "changed",
    [
        TENSORS[:2],
        [("a.weights", *TENSORS[0][1:]), *TENSORS[1:]],
        [("a.weight", "bfloat16", *TENSORS[0][2:]), *TENSORS[1:]],
        [("a.weight", "float32", (4, 1), TENSORS[0][3]), *TENSORS[1:]],
        [("a.weight", "float32", (4,), TENSORS[0][3]), *TENSORS[1:]],
        [("b", *TENSORS[0][1:]), ("a.weight", *TENSORS[1][1:]), TENSORS[2]],
        [*TENSORS, TENSORS[0]],
    ],
)
def test_name_dtype_shape_and_number_matter(changed):
    assert fingerprint(changed) != fingerprint(TENSORS)


def test_a_name_cannot_pass_for_two_tensors():
    import hashlib

    first = hashlib.sha256(TENSORS[0][3]).hexdigest()
    forged = f"a.weight float32 2x2 {first}\nb"
    assert fingerprint([(forged, *TENSORS[1][1:]), TENSORS[2]]) != fingerprint(TENSORS)
