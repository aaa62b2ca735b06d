"""uvicorn's HTTP connection, with an end to what one client may take: header bytes, time to send, time to read."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deployfa.serving.limits import Limits

__all__ = ["guarded"]


def guarded(limits: Limits) -> type[HttpToolsProtocol]:
    """A protocol class for uvicorn's ``http`` option.

    A request must have arrived whole ``limits.read_s`` after its first byte, or it is answered with 408; a request line
    and headers, or what stands around a body in chunks, of more than ``limits.header_bytes`` with 431; a client that
    does not read its answer for ``limits.write_s`` is cut off; connections beyond ``limits.connections`` get 503.
    Everything is one line of JSON.
    """

    class Guarded(HttpToolsProtocol):
        _reading: asyncio.TimerHandle | None = None
        _writing: asyncio.TimerHandle | None = None
        #: bytes that came since the last that were of use: a head that was whole, or a piece of a body
        _useless = 0
        _in_head = False
        _receiving = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refuse(503, f"{limits.connections} connections are open; try again", retry_after=True)
                return
            # a connection on which nothing ever comes is idle too
            self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop(reading=True, writing=True)
            self._unset_keepalive_if_required()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._useless += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self._receiving and self._useless > limits.header_bytes:
                self._too_long()
            elif not self._receiving:
                self._stop(reading=True)
                if self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
                    # an empty line, or a body that nobody reads any more: it ended the waiting for a request
                    self._await_request()
            elif self._reading is None:
                self._reading = self.loop.call_later(limits.read_s, self._too_slow)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            # the one before is whole: who sends them without a pause has the time again for each
            self._stop(reading=True)
            self._receiving = self._in_head = True
            self._header_size = 0

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._header_size += len(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._in_head:
                return  # behind a body in chunks: nobody asks for it, and it would be kept
            self._header_size += len(name) + len(value) + 4
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._useless = 0
            if self._header_size > limits.header_bytes:
                self._too_long()
                return
            if self.parser.should_upgrade() and _has_body(self.headers):
                # the parser takes the body for the other protocol
                self._refuse(400, "the body would follow an Upgrade; send HTTP/1.1 without that header")
                return
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._useless = 0
            if self.cycle is not None:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._receiving = False
            if self.cycle is not None:
                super().on_message_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            if self._writing is None:
                self._writing = self.loop.call_later(limits.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop(writing=True)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            if self._writing is None:
                # closing waits until what is left is sent, and nobody may ever read it
                self._writing = self.loop.call_later(limits.write_s, self.transport.abort)

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg.rstrip(".").lower() + "; send HTTP/1.1")

        def _await_request(self) -> None:
            self.timeout_keep_alive_task = self.loop.call_later(limits.idle_s, self.timeout_keep_alive_handler)

        def _too_long(self) -> None:
            self._refuse(431, f"the headers have more than {limits.header_bytes:,} bytes; send shorter ones")

        def _too_slow(self) -> None:
            self._reading = None
            self._refuse(408, f"the request did not arrive within {limits.read_s:g} s; send it faster")

        def _refuse(self, status: int, told: str, *, retry_after: bool = False) -> None:
            """One answer that no application sees, and the end of the connection."""
            if self.transport.is_closing():
                return
            if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
                body = msgspec.json.encode({"error": told})
                head = [STATUS_LINE[status], b"content-type: application/json\r\n"]
                if retry_after:
                    head.append(b"retry-after: 1\r\n")
                head.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
                self.transport.write(b"".join(head) + body)
            if self.cycle is not None and not self.cycle.response_complete:
                # whoever waits for the rest of this request waits no longer
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

        def _stop(self, *, reading: bool = False, writing: bool = False) -> None:
            if reading and self._reading is not None:
                self._reading.cancel()
                self._reading = None
            if writing and self._writing is not None:
                self._writing.cancel()
                self._writing = None

    made: Any = Guarded
    return made  # type: ignore[no-any-return]


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and int(value)) for name, value in headers)
