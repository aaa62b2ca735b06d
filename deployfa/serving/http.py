"""Bodies in, answers out, on bare ASGI: what every route shares."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

import msgspec

from deployfa.errors import RequestError
from deployfa.serving.compression import compress, decompress
from deployfa.serving.limits import Limits

__all__ = [
    "Headers",
    "Intake",
    "Receive",
    "Scope",
    "Send",
    "header",
    "read_body",
    "send_answer",
    "send_error",
    "send_json",
]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")
_BINARY = (b"content-type", b"application/octet-stream")


def header(scope: Scope, name: bytes) -> bytes | None:
    """The only value of a header, None if it is not there.  Raises ``RequestError`` if it is there twice."""
    found: bytes | None = None
    for key, value in scope["headers"]:
        if key == name:
            if found is not None and found != value:
                raise RequestError(f"the header {name.decode()} is there twice; send it once")
            found = value
    return found


class Intake:
    """Bytes of bodies that the server holds at this moment, of all requests that it has not answered yet."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def hold(self, told: MutableMapping[str, Any], count: int) -> None:
        """On account of the request that ``told`` is of.  Raises ``RequestError``, 503, beyond the limit."""
        if self.held + count > self._limit:
            raise RequestError(f"requests of {self.held:,} bytes are being answered; try again", 503, retry_after_s=1.0)
        self.held += count
        told["held"] = told.get("held", 0) + count

    def let_go(self, told: MutableMapping[str, Any]) -> None:
        """The request is answered."""
        self.held -= told.pop("held", 0)


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The whole body, decompressed.  Raises ``RequestError``: 413 for one too large, as soon as that is known, and 499
    if the client went away."""
    length = header(scope, b"content-length")
    # what is no number never comes this far: the parser has refused it
    if length is not None and int(length) > limits.body_bytes:
        raise _too_large(limits)
    told = scope["deployfa"]
    intake: Intake = told["intake"]
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        pieces, size = [body], len(body)
        intake.hold(told, size)
        while message.get("more_body", False):
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            intake.hold(told, len(message["body"]))
            size += len(message["body"])
            if size > limits.body_bytes:
                # an error holds the frame that it comes from, and may outlive the request
                pieces.clear()
                raise _too_large(limits)
            pieces.append(message["body"])
        body = b"".join(pieces)
    if message["type"] == "http.disconnect":
        raise RequestError("the client is gone", 499)
    if len(body) > limits.body_bytes:
        raise _too_large(limits)
    encoding = header(scope, b"content-encoding")
    if encoding is None or encoding == b"identity":
        return body
    loop = asyncio.get_running_loop()
    body = await loop.run_in_executor(None, decompress, body, encoding.decode("latin-1").lower(), limits.body_bytes)
    intake.hold(told, len(body))
    return body


async def send_answer(
    send: Send,
    pieces: Sequence[bytes],
    *,
    json_length: int | None = None,
    encoding: str | None = None,
    headers: Headers = (),
) -> None:
    """200 with the protocol's body; ``json_length``: of its first piece, if binary tensors follow."""
    body = b"".join(pieces) if len(pieces) > 1 else pieces[0]
    sent = [*headers]
    if json_length is None:
        sent.append(_JSON)
    else:
        sent += [_BINARY, (b"inference-header-content-length", b"%d" % json_length)]
    if encoding is not None:
        body = await asyncio.get_running_loop().run_in_executor(None, compress, body, encoding)
        sent.append((b"content-encoding", encoding.encode()))
    await _send(send, 200, body, sent)


async def send_json(send: Send, value: Any, *, status: int = 200, headers: Headers = ()) -> None:
    await _send(send, status, msgspec.json.encode(value), [_JSON, *headers])


async def send_error(send: Send, error: RequestError, *, headers: Headers = ()) -> None:
    """``{"error": …}`` with the error's status."""
    sent = [_JSON, *headers]
    if error.retry_after_s is not None:
        sent.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if error.status == 401:
        sent.append((b"www-authenticate", b"Bearer"))
    await _send(send, error.status, msgspec.json.encode({"error": str(error)}), sent)


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _too_large(limits: Limits) -> RequestError:
    return RequestError(
        f"the body is larger than {limits.body_bytes:,} bytes; send fewer rows, or raise --max-body", 413
    )
