from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from deployfa.bench import Shape
from deployfa.bench.feeds import make_feeds
from deployfa.errors import RuntimeTargetError
from deployfa.runtimes import TensorSpec

INPUTS = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("s43", "s41")),
    TensorSpec("token_type_ids", "int64", ("batch", "sequence")),
    TensorSpec("position_ids", "int32", (1, "sequence")),
    TensorSpec("pixel_values", "float32", ("batch", 3, 8, 8)),
    TensorSpec("rows", "int64", ("sequence_length", "batch_size")),
    TensorSpec("flag", "bool", ()),
    TensorSpec("lam", "bfloat16", (4,)),
)


def test_feeds_by_name_and_dtype():
    feeds = make_feeds(INPUTS, Shape(2, 50), vocabulary=30)
    assert {name: array.shape for name, array in feeds.items()} == {
        "input_ids": (2, 50),
        "attention_mask": (2, 50),
        "token_type_ids": (2, 50),
        "position_ids": (1, 50),
        "pixel_values": (2, 3, 8, 8),
        "rows": (50, 2),
        "flag": (),
        "lam": (4,),
    }
    assert [feeds[spec.name].dtype.name for spec in INPUTS] == [spec.dtype for spec in INPUTS]
    assert feeds["input_ids"].min() == 1 and feeds["input_ids"].max() == 29
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["token_type_ids"] == 0).all() and (feeds["rows"] == 0).all() and not feeds["flag"]
    assert feeds["position_ids"][0].tolist() == list(range(50))
    assert 0.8 < feeds["pixel_values"].std() < 1.2
    assert feeds["lam"].dtype == np.dtype(ml_dtypes.bfloat16)


def test_the_seed_and_the_name_decide_not_the_order():
    shape = Shape(2, 5)
    first, again = make_feeds(INPUTS, shape, seed=1), make_feeds(INPUTS[::-1], shape, seed=1)
    other = make_feeds(INPUTS, shape, seed=2)
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["input_ids"] != other["input_ids"]).any()


def test_a_dtype_that_cannot_be_made_up():
    with pytest.raises(RuntimeTargetError, match="'x' is float8e4m3fn; no feed of that type"):
        make_feeds([TensorSpec("x", "float8e4m3fn", (2,))], Shape(1, 1))


DECODER = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "total_sequence")),
    TensorSpec("position_ids", "int64", ("batch", "sequence")),
    *(
        TensorSpec(f"past_key_values.0.{part}", "float32", ("batch", 3, "past_sequence", 8))
        for part in ("key", "value")
    ),
    TensorSpec("logits_to_keep", "int64", ("kept",)),
)


def test_a_decoder_is_fed_one_token_after_those_that_it_has_read():
    feeds = make_feeds(DECODER, Shape(2, 50), vocabulary=30)
    assert {name: array.shape for name, array in feeds.items()} == {
        "input_ids": (2, 1),
        "attention_mask": (2, 51),
        "position_ids": (2, 1),
        "past_key_values.0.key": (2, 3, 50, 8),
        "past_key_values.0.value": (2, 3, 50, 8),
        "logits_to_keep": (1,),
    }
    assert (feeds["position_ids"] == 50).all()
    assert (feeds["attention_mask"] == 1).all()
    # the one new token
    assert feeds["logits_to_keep"].tolist() == [0]
    assert [feeds[spec.name].dtype.name for spec in DECODER] == [spec.dtype for spec in DECODER]
    assert (feeds["past_key_values.0.key"] != feeds["past_key_values.0.value"]).any()


def test_without_a_cache_the_whole_sequence_is_fed():
    """The same names, but nothing to keep logits of: a graph that reads all tokens at once."""
    feeds = make_feeds(DECODER[:3], Shape(2, 50))
    assert {array.shape for array in feeds.values()} == {(2, 50)}
    assert feeds["position_ids"][1].tolist() == list(range(50))


def test_the_adapters_of_a_pack_are_drawn_for_a_decoder_too():
    feeds = make_feeds((*DECODER, TensorSpec("adapter_ids", "int64", ("batch",))), Shape(4, 9), adapters=3)
    assert sorted(set(feeds["adapter_ids"].tolist())) == [1, 2, 3]
