"""Compressed bodies, and those that pretend to be."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployfa.errors import RequestError
from deployfa.serving.compression import accepted_encoding, compress, decompress


@given(st.binary(max_size=2000))
def test_back_again(body: bytes) -> None:
    for encoding in ("gzip", "deflate"):
        assert decompress(compress(body, encoding), encoding, 2000) == body
    assert gzip.decompress(compress(body, "gzip")) == body and zlib.decompress(compress(body, "deflate")) == body
    bare = zlib.compressobj(wbits=-15)
    assert decompress(bare.compress(body) + bare.flush(), "deflate", 2000) == body


def test_a_bomb_is_stopped_at_the_limit() -> None:
    bomb = zlib.compress(b"\0" * 10_000_000)
    tracemalloc.start()
    with pytest.raises(RequestError, match="more than 1,000 bytes") as refused:
        decompress(bomb, "deflate", 1000)
    assert refused.value.status == 413 and tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert len(decompress(bomb, "deflate", 10_000_000)) == 10_000_000


@pytest.mark.parametrize(
    ("body", "encoding", "words"),
    [
        (gzip.compress(b"x", mtime=0)[:-3], "gzip", "cut off"),
        (gzip.compress(b"x", mtime=0) + b"y", "gzip", "follow"),
        (b"plain text", "gzip", "not compressed"),
        (b"\xff" * 9, "deflate", "not compressed"),
        (b"", "gzip", "cut off"),
        (b"x", "br", "'br' is not taken"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, encoding: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        decompress(body, encoding, 100)


@pytest.mark.parametrize(
    ("header", "encoding"),
    [("gzip", "gzip"), ("br, deflate", "deflate"), ("gzip;q=0, deflate", "deflate"), ("br", None), ("", None)],
)
def test_what_a_client_accepts(header: str, encoding: str | None) -> None:
    assert accepted_encoding(header) == encoding
