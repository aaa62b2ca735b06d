"""Sizes of dimensions: written, read, resolved, and checked before a GPU is touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployfa.errors import InputError, RuntimeTargetError
from deployfa.runtimes.runner import TensorSpec
from deployfa.runtimes.tensorrt.profiles import (
    Sizes,
    check_profile,
    dimensions,
    parse_profile,
    resolve_profile,
    shape_range,
)

NAMES = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
SIZES = st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3).map(sorted).filter(lambda found: found[2] > 0)
PROFILES = st.dictionaries(NAMES, SIZES.map(lambda found: Sizes(*found)), max_size=4)


@given(PROFILES)
def test_what_is_written_is_read_again(profile: dict[str, Sizes]) -> None:
    assert parse_profile(f"{name}={sizes}" for name, sizes in profile.items()) == profile


def test_one_number_is_all_three() -> None:
    assert parse_profile(["batch=4", "sequence=1, 2 ,3"]) == {"batch": Sizes(4, 4, 4), "sequence": Sizes(1, 2, 3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch", "'batch' is no profile; write it as NAME=MIN,OPT,MAX, such as batch=1,4,16"),
        ("=1,2,3", "is no profile"),
        ("batch=", "is no profile"),
        ("batch=1,2", "is no profile"),
        ("batch=1,2,3,4", "is no profile"),
        ("batch=one,two,three", "is no profile"),
        ("batch=1,,3", "is no profile"),
        ("batch=-1,2,3", "is no profile"),
        ("batch=1.0,2,3", "is no profile"),
        ("batch=²", "is no profile"),
        ("batch=4,2,8", "is out of order; sizes go from the smallest to the largest: batch=1,4,16"),
        ("batch=1,9,8", "is out of order"),
        ("batch=0,0,0", "is out of order"),
        ("batch=1,2,2147483648", "is more than an engine can take; the largest size is 2147483647"),
        # Python reads no integer of more than 4300 digits
        ("batch=" + "9" * 5000, "a size of 'batch' has more than 20 digits; the largest size is 2147483647"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_profile([text])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_twice_is_refused() -> None:
    with pytest.raises(InputError, match="two profiles for 'batch'; pass one"):
        parse_profile(["batch=1,2,3", "sequence=4", "batch=1,2,3"])


IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("mask", "int64", ("batch", "past+sequence"))
KEYS = TensorSpec("keys", "float32", ("batch", 4, "past", 8))
NEXT = TensorSpec("next", "float32", ("1 + past",))
DECODE = [IDS, MASK, KEYS, NEXT]
PROFILE = {"batch": Sizes(1, 2, 4), "sequence": Sizes(1, 1, 8), "past": Sizes(0, 32, 64)}


def test_a_sum_has_the_sizes_of_its_terms() -> None:
    assert dimensions(DECODE) == ["batch", "sequence", "past"]
    assert shape_range(MASK, PROFILE) == ((1, 1), (2, 33), (4, 72))
    assert shape_range(KEYS, PROFILE) == ((1, 4, 0, 8), (2, 4, 32, 8), (4, 4, 64, 8))
    assert shape_range(NEXT, PROFILE) == ((1,), (33,), (65,))


def test_given_sizes_come_before_defaults() -> None:
    given = {"past": Sizes(3, 4, 5)}
    assert resolve_profile(DECODE, given, {**PROFILE, "heads": Sizes(1, 1, 1)}) == {**PROFILE, **given}


def test_a_name_that_no_input_has() -> None:
    message = "no dimension 'seq'; dynamic dimensions of this graph: batch, sequence, past"
    with pytest.raises(InputError, match=message):
        resolve_profile(DECODE, {"seq": Sizes(1, 1, 1)}, PROFILE)
    with pytest.raises(InputError, match="dynamic dimensions of this graph: none, every size is fixed"):
        resolve_profile([TensorSpec("x", "float32", (1, 3))], {"batch": Sizes(1, 1, 1)}, {})


def test_a_dimension_without_sizes() -> None:
    with pytest.raises(InputError, match="no sizes for dimension 'past'; pass --profile past=MIN,OPT,MAX"):
        resolve_profile(DECODE, {}, {name: PROFILE[name] for name in ("batch", "sequence")})


@given(st.data())
def test_a_feed_is_taken_if_and_only_if_every_size_is_within(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(0, 6)), data.draw(st.integers(0, 80)))
    (low_batch, low_mask), _, (high_batch, high_mask) = shape_range(MASK, PROFILE)
    within = low_batch <= shape[0] <= high_batch and low_mask <= shape[1] <= high_mask
    feeds = {"mask": np.empty(shape, np.int64)}
    if within:
        check_profile(feeds, DECODE, PROFILE)
    else:
        with pytest.raises(RuntimeTargetError, match="engine was built for"):
            check_profile(feeds, DECODE, PROFILE)


def test_a_size_outside_names_the_input_the_dimension_and_the_way_out() -> None:
    wanted = "input 'ids' has sequence 9, and the engine was built for 1 to 8; compile it again with --profile sequence"
    with pytest.raises(RuntimeTargetError, match=wanted):
        check_profile({"ids": np.zeros((2, 9), np.int64)}, DECODE, PROFILE)
