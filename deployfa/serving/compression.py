"""gzip and deflate, with an end to what a small body may become."""

from __future__ import annotations

import zlib

from deployfa.errors import RequestError

__all__ = ["ENCODINGS", "accepted_encoding", "compress", "decompress"]

ENCODINGS = ("gzip", "deflate")
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
#: Answers are small and sent once: the fastest level.
_LEVEL = 1


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """``body`` without its ``encoding``; ``deflate`` is zlib's format, or, as some clients send it, the bare stream.

    Raises ``RequestError`` for an unknown encoding (415), for what is not compressed so, and as soon as more than
    ``limit`` bytes come out (413).
    """
    if encoding not in ENCODINGS:
        raise RequestError(f"Content-Encoding '{encoding[:40]}' is not taken; send {' or '.join(ENCODINGS)}", 415)
    try:
        return _inflate(body, _GZIP_OR_ZLIB, limit, encoding)
    except zlib.error as error:
        if encoding == "deflate":
            try:
                return _inflate(body, _RAW, limit, encoding)
            except zlib.error:
                pass
        raise RequestError(f"the body is not compressed with {encoding} ({error}); compress it so") from error


def _inflate(body: bytes, wbits: int, limit: int, encoding: str) -> bytes:
    stream = zlib.decompressobj(wbits)
    content = stream.decompress(body, limit + 1)
    if len(content) > limit:
        # an error holds the frame that it comes from, and may outlive the request
        del content
        raise RequestError(f"the body has more than {limit:,} bytes once decompressed; send fewer rows", 413)
    if not stream.eof:
        raise RequestError(f"the {encoding} stream of the body is cut off; send all of it")
    if stream.unused_data:
        raise RequestError(f"{len(stream.unused_data)} bytes follow the {encoding} stream of the body; send none")
    return content


def accepted_encoding(header: str) -> str | None:
    """The first of ours that an ``Accept-Encoding`` names and does not forbid with ``q=0``; ``None`` for neither."""
    for entry in header.lower().split(","):
        name, _, quality = entry.partition(";")
        name = name.strip()
        if name in ENCODINGS and quality.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}:
            return name
    return None


def compress(body: bytes, encoding: str) -> bytes:
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP if encoding == "gzip" else _ZLIB)
    return stream.compress(body) + stream.flush()
