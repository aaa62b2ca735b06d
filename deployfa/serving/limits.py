"""What one server takes from strangers, and no more."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IMAGE", "Limits"]

#: The input that takes encoded pictures.
IMAGE = "image"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes in bytes, times in seconds.

    ``body_bytes``: of a request, after decompression too; ``json_bytes``: of its JSON part; ``header_bytes``: of the
    request line and all headers; ``held_bytes``: of the bodies of all requests together that are not answered yet;
    ``elements``: of all tensors of a request; ``text_bytes``: of one text;
    ``picture_bytes``: of one encoded picture.  ``read_s``: by when a request must have
    arrived whole, counted from its first byte; ``idle_s``: how long a connection may wait for its next request;
    ``write_s``: how long a client may leave an answer unread.
    """

    body_bytes: int = 32 * 2**20
    json_bytes: int = 8 * 2**20
    header_bytes: int = 32 * 2**10
    held_bytes: int = 512 * 2**20
    tensors: int = 64
    dimensions: int = 8
    elements: int = 16 * 2**20
    text_bytes: int = 256 * 2**10
    picture_bytes: int = 16 * 2**20
    connections: int = 1024
    read_s: float = 30.0
    idle_s: float = 75.0
    write_s: float = 30.0
