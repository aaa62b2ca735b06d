"""Requests of different lengths in one batch: each gets its own rows back, as if it had been alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployfa.errors import RequestError
from deployfa.runtimes.runner import TensorSpec
from deployfa.serving.signature import Signature

INPUTS = [TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")]
OUTPUTS = [TensorSpec("logits", "float32", ("batch", 3)), TensorSpec("tokens", "float32", ("batch", "sequence", 2))]


def feeds(rows: int, length: int) -> dict[str, np.ndarray]:
    ids = np.arange(1, rows * length + 1).reshape(rows, length)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def checked(signature: Signature, given_: dict[str, np.ndarray]):
    return signature.check(given_, max_rows=8, max_tokens=200)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=5))
def test_rows_come_back_without_their_padding(requests: list[tuple[int, int]]) -> None:
    signature = Signature(INPUTS, OUTPUTS, fill=7)
    works = [feeds(rows, length) for rows, length in requests]
    longest = max(length for _, length in requests)
    batch = signature.batched(works, [rows for rows, _ in requests], longest)
    assert batch["input_ids"].shape == (sum(rows for rows, _ in requests), longest)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    ids = batch["input_ids"].astype(np.float32)
    outputs = {"logits": ids[:, :1] * np.ones(3, np.float32), "tokens": np.stack([ids, -ids], axis=2)}
    start = 0
    for (rows, length), own in zip(requests, works, strict=True):
        part = signature.parted(outputs, start, rows, length)
        assert np.array_equal(part["tokens"][..., 0], own["input_ids"])
        assert np.array_equal(part["logits"][:, 0], own["input_ids"][:, 0])
        start += rows


def test_without_a_mask_nothing_is_padded() -> None:
    signature = Signature(INPUTS[:1], OUTPUTS[:1])
    assert signature.padded is None and signature.batch == "batch"
    short, long = (checked(signature, {"input_ids": feeds(1, length)["input_ids"]}) for length in (3, 4))
    assert short.shape != long.shape and short.length == 1
    padded = Signature(INPUTS, OUTPUTS)
    assert checked(padded, feeds(1, 3)).shape == checked(padded, feeds(1, 4)).shape


def test_outputs_without_a_batch_are_answered_one_by_one() -> None:
    assert Signature(INPUTS, [TensorSpec("pooled", "float32", (3,))]).batch is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": np.ones(1)}, "'extra' is no input"),
        ({"attention_mask": None}, "'attention_mask' is missing"),
        ({"input_ids": np.ones((2, 4), np.int32)}, "is INT32; send INT64"),
        ({"input_ids": np.ones((2, 4, 1), np.int64)}, "has shape"),
        ({"input_ids": np.ones((0, 4), np.int64)}, "from 1 on"),
        ({"input_ids": np.ones((2, 5), np.int64)}, "make them the same"),
        ({"input_ids": np.full((2, 4), 100)}, "holds 100; send numbers from 0 to 99"),
        ({"input_ids": np.full((2, 4), -1)}, "holds -1"),
        ({"input_ids": np.full((2, 4), 2**32 + 5)}, "holds 4294967301"),
        ({"attention_mask": np.array([[1, 1, 1, 1], [0, 0, 0, 0]])}, "all zeros"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, np.ndarray | None], words: str) -> None:
    signature = Signature(INPUTS, OUTPUTS, ranges={"input_ids": 100})
    assert checked(signature, feeds(2, 4)).rows == 2
    wrong = {name: array for name, array in {**feeds(2, 4), **change}.items() if array is not None}
    with pytest.raises(RequestError, match=words):
        checked(signature, wrong)


def test_rows_and_tokens_have_an_end() -> None:
    signature = Signature(INPUTS, OUTPUTS)
    with pytest.raises(RequestError, match="9 rows"):
        checked(signature, feeds(9, 1))
    with pytest.raises(RequestError, match="8 x 26 tokens"):
        checked(signature, feeds(8, 26))


def test_a_view_of_the_body_is_copied_before_the_runtime_reads_it() -> None:
    body = b"x" + np.arange(4).tobytes()
    view = np.frombuffer(memoryview(body)[1:], np.int64).reshape(1, 4)
    signature = Signature(INPUTS, OUTPUTS)
    batch = signature.batched([{"input_ids": view, "attention_mask": view}], [1], 4)
    assert batch["input_ids"].flags.aligned and np.array_equal(batch["input_ids"], view)
