"""What comes in is what was sent, or one line says why not."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deployfa.errors import RequestError
from deployfa.serving.datatypes import DATATYPES, datatype_of
from deployfa.serving.limits import Limits
from deployfa.serving.request import WantedOutput, parse_request
from deployfa.serving.response import encode_response

LIMITS = Limits(json_bytes=100_000, elements=1000, text_bytes=50)
_shapes = arrays.array_shapes(min_dims=1, max_dims=4, max_side=4)


def _arrays(name: str) -> st.SearchStrategy[np.ndarray]:
    dtype = DATATYPES[name]
    if name == "BF16":
        made = arrays.arrays(np.float32, _shapes, elements=st.floats(-100, 100, width=32))
        return made.map(lambda array: array.astype(dtype))
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return arrays.arrays(dtype, _shapes, elements=elements)


@pytest.mark.parametrize("name", DATATYPES)
@given(st.data())
def test_binary_tensors_come_as_they_were_sent(name: str, data: st.DataObject) -> None:
    array = data.draw(_arrays(name))
    tensor = {"name": "x", "shape": array.shape, "datatype": name, "parameters": {"binary_data_size": array.nbytes}}
    head = json.dumps({"inputs": [tensor]}).encode()
    got = parse_request(head + array.tobytes(), str(len(head)).encode(), LIMITS).inputs["x"]
    assert got.shape == array.shape and got.dtype == array.dtype and got.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", [name for name in DATATYPES if name not in ("FP16", "BF16")])
@given(st.data())
def test_json_tensors_flat_and_nested(name: str, data: st.DataObject) -> None:
    array = data.draw(_arrays(name))
    for shown in (array.tolist(), array.reshape(-1).tolist()):
        body = json.dumps({"inputs": [{"name": "x", "shape": array.shape, "datatype": name, "data": shown}]}).encode()
        got = parse_request(body, None, LIMITS).inputs["x"]
        assert got.shape == array.shape and np.array_equal(got, array)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5))
def test_texts_both_ways(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    sent = np.empty(len(texts), object)
    sent[:] = [text.encode() for text in texts]
    pieces, length = encode_response("m", "1", "", {"x": sent}, [WantedOutput("x", True)])
    answer = json.loads(pieces[0])
    head = json.dumps({"inputs": answer["outputs"]}).encode()
    assert length == len(pieces[0])
    binary = parse_request(head + pieces[1], str(len(head)).encode(), LIMITS).inputs["x"]
    (body,), _ = encode_response("m", "1", "", {"x": sent}, [WantedOutput("x", False)])
    plain = parse_request(json.dumps({"inputs": json.loads(body)["outputs"]}).encode(), None, LIMITS).inputs["x"]
    assert list(binary) == list(plain) == list(sent)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [2], "datatype": "INT64", "data": [1, 2], **changes}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([tensor(shape=[-1])], "dimension of -1"),
        ([tensor(shape=[2**64, 2**64])], "more than 1,000"),
        ([tensor(shape=[1] * 9)], "9 dimensions"),
        ([tensor(shape=[0, 2**63], data=[])], "more than 1,000"),
        ([tensor(shape=[2**40, 0, 2**40], data=[])], "more than 1,000"),
        ([tensor(shape=[10**4000] * 8)], "more than 1,000"),
        ([tensor(shape=[-(10**4000)])], "dimension of -1000"),
        ([tensor(shape=[3])], "2 elements for shape"),
        ([tensor(datatype="INT3")], "there are: BOOL"),
        ([tensor(datatype="FP16")], "send it as binary data"),
        ([tensor(data=[1, 2.5])], "not a list of INT64"),
        ([tensor(data=[1, 2**63])], "no INT64"),
        ([tensor(datatype="UINT8", data=[1, 256])], "no UINT8"),
        ([tensor(datatype="FP32", data=[1, 1e39])], "NaN or infinity"),
        ([tensor(), tensor()], "given twice"),
        ([], "no inputs"),
        ([tensor(parameters={"binary_data_size": 16})], "both data and"),
        ([{k: v for k, v in tensor().items() if k != "data"}], "has no data"),
        ([tensor(parameters={"shared_memory_region": "r"})], "no shared memory"),
        ([tensor(datatype="BYTES", data=["a", "b" * 51])], "51 bytes"),
        ([tensor(name=f"x{n}") for n in range(65)], "more than 64 tensors"),
    ],
)
def test_what_is_wrong_is_named(inputs: list[Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        parse_request(json.dumps({"inputs": inputs}).encode(), None, LIMITS)
    assert 400 <= refused.value.status < 500 and "\n" not in str(refused.value)


def test_a_large_json_part_is_refused_before_it_is_read() -> None:
    with pytest.raises(RequestError, match="JSON part") as refused:
        parse_request(b"[" * 200_000, None, LIMITS)
    assert refused.value.status == 413


@pytest.mark.parametrize("content", [b"\x05\0\0\0ab", b"\x01\0\0", b"\x01\0\0\0ab", b"\xff\xff\xff\xffa"])
def test_texts_with_wrong_lengths(content: bytes) -> None:
    size = {"binary_data_size": len(content)}
    given_ = {"name": "x", "shape": [1], "datatype": "BYTES", "parameters": size}
    head = json.dumps({"inputs": [given_]}).encode()
    with pytest.raises(RequestError, match="'x'"):
        parse_request(head + content, str(len(head)).encode(), LIMITS)


def test_no_room_is_made_for_texts_that_are_not_there() -> None:
    """16 million of them, in a request of 200 bytes."""
    given_ = {"name": "x", "shape": [16 * 2**20], "datatype": "BYTES", "parameters": {"binary_data_size": 4}}
    head = json.dumps({"inputs": [given_]}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="too few for 16777216 elements"):
            parse_request(head + b"\0\0\0\0", str(len(head)).encode(), Limits())
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@given(st.lists(st.one_of(st.integers(-2, 5), st.sampled_from([2**31, 2**63, 2**64, 10**4299])), max_size=9))
def test_any_shape_is_taken_or_refused(shape: list[int]) -> None:
    for datatype, data in (("INT64", [1, 2]), ("INT64", []), ("BYTES", [])):
        body = json.dumps({"inputs": [tensor(shape=shape, datatype=datatype, data=data)]}).encode()
        with contextlib.suppress(RequestError):
            assert list(parse_request(body, None, LIMITS).inputs["x"].shape) == shape
        sent = {"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": 8}}
        head = json.dumps({"inputs": [sent]}).encode()
        with contextlib.suppress(RequestError):
            assert list(parse_request(head + bytes(8), str(len(head)).encode(), LIMITS).inputs["x"].shape) == shape


def test_any_byte_but_zero_is_true() -> None:
    given_ = {"name": "x", "shape": [3], "datatype": "BOOL", "parameters": {"binary_data_size": 3}}
    head = json.dumps({"inputs": [given_]}).encode()
    got = parse_request(head + b"\0\1\2", str(len(head)).encode(), LIMITS).inputs["x"]
    assert got.tolist() == [False, True, True] and got.view(np.uint8).tolist() == [0, 1, 1]


def test_numbers_that_json_lacks_are_null_and_themselves_in_binary() -> None:
    array = np.array([[1.0, -np.inf, np.nan]], np.float32)
    (body,), _ = encode_response("m", "1", "id", {"x": array}, [WantedOutput("x", False)])
    assert json.loads(body) == {
        "model_name": "m",
        "model_version": "1",
        "id": "id",
        "outputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0, None, None]}],
    }
    pieces, _ = encode_response("m", "1", "", {"x": array}, [WantedOutput("x", True)])
    assert pieces[1] == array.tobytes()


def test_classes_are_the_largest_with_their_labels() -> None:
    array = np.array([[0.1, 0.7, 0.2]], np.float32)
    wanted = [WantedOutput("x", False, classes=2)]
    (body,), _ = encode_response("m", "1", "", {"x": array}, wanted, labels=["a", "b", "c"])
    assert json.loads(body)["outputs"][0]["data"] == ["0.700000:1:b", "0.200000:2:c"]


def test_names_of_types_are_those_of_their_numbers() -> None:
    assert all(datatype_of(dtype) == name for name, dtype in DATATYPES.items())
    assert datatype_of(np.dtype(object)) == "BYTES" and datatype_of("float32") == "FP32"
