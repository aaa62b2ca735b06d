"""What one connection may take: time, headers, and whatever else surrounds a request.  Under a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deployfa.serving.connection import guarded
from deployfa.serving.limits import Limits

LIMITS = Limits(header_bytes=1000, read_s=0.4, idle_s=0.6, write_s=0.3)
ASK = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


class Application:
    """Answers with the body, and as many bytes more as the path says; ``/early`` without having read it."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.left = threading.Event()

    async def __call__(self, scope, receive, send) -> None:
        body, more = b"", scope["path"] != "/early"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await asyncio.sleep(0)
        self.headers = list(scope["headers"])
        if scope["path"][1:].isdigit():
            body += b"x" * int(scope["path"][1:])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})
        self.left.set()


class Running:
    def __init__(self, protocol: type) -> None:
        self.application = Application()
        self.listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            self.application, http=protocol, lifespan="off", ws="none", log_config=None, interface="asgi3"
        )
        config.timeout_keep_alive = LIMITS.idle_s  # type: ignore[assignment]
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self.listening],), daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        return len(self._server.server_state.connections)

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        with socket.create_connection(self.listening.getsockname(), 5) as made:
            yield made

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self.listening.close()


@pytest.fixture(scope="module")
def running():
    made = Running(guarded(LIMITS))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def unguarded():
    """What uvicorn alone does, to see that the tests can fail."""
    made = Running(HttpToolsProtocol)
    yield made
    made.stop()


def until_closed(connection: socket.socket, wait_s: float = 3.0) -> bytes | None:
    """All that comes until the server closes; ``None`` if it does not."""
    connection.settimeout(wait_s)
    content = b""
    try:
        while block := connection.recv(65536):
            content += block
    except TimeoutError:
        return None
    except ConnectionError:
        pass
    return content


def test_requests_without_a_pause_have_the_time_again_for_each(running: Running) -> None:
    """No piece ends where a request ends, for longer than one request may take."""
    count = 12
    stream = ASK * count
    cut = len(ASK) + 10
    with running.connection() as connection:
        connection.sendall(stream[:cut])
        while cut < len(stream):
            time.sleep(2 * LIMITS.read_s / count)
            connection.sendall(stream[cut : cut + len(ASK)])
            cut += len(ASK)
        content = until_closed(connection)
    assert content is not None and content.count(b" 200 OK") == count and b" 408 " not in content


def test_half_a_request_behind_a_whole_one_is_not_waited_for(running: Running) -> None:
    with running.connection() as connection:
        connection.sendall(ASK + ASK[:20])
        content = until_closed(connection)
    assert content is not None and content.count(b" 200 OK") == 1 and b" 408 " in content


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"x: y\r\n" * 1000),
        (CHUNKED + b"5\r\nhello\r\n0\r\nx: ", b"y" * 5000),
        (CHUNKED + b"5;x=", b"y" * 5000),
        (b"GET / HTTP/1.1\r\nx: ", b"y" * 5000),
    ],
    ids=["trailers", "one long trailer", "chunk extension", "header"],
)
def test_what_is_no_body_has_an_end(running: Running, unguarded: Running, begins: bytes, goes_on: bytes) -> None:
    with running.connection() as connection:
        connection.sendall(begins)
        time.sleep(0.05)
        connection.sendall(goes_on)
        content = until_closed(connection)
    assert content is not None and b" 431 " in content and b'{"error":' in content
    with unguarded.connection() as connection:
        connection.sendall(begins)
        connection.sendall(goes_on)
        assert until_closed(connection, 0.2) is None  # it would go on for ever


def test_trailers_are_no_headers(running: Running) -> None:
    with running.connection() as connection:
        connection.sendall(CHUNKED + b"5\r\nhello\r\n0\r\nauthorization: Bearer x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert {name for name, _ in running.application.headers} == {b"host", b"transfer-encoding"}


def test_small_chunks_are_a_body_like_any_other(running: Running) -> None:
    with running.connection() as connection:
        connection.sendall(CHUNKED + b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n")
        content = until_closed(connection)
    assert content is not None and b" 200 OK" in content and content.endswith(b"x" * 5000)


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_a_body_behind_an_upgrade_is_refused_and_not_lost(
    running: Running, unguarded: Running, protocol: bytes
) -> None:
    asked = b"connection: upgrade\r\nupgrade: " + protocol + b"\r\n"
    raw = ASK.replace(b"host: x\r\n", asked)
    with running.connection() as connection:
        connection.sendall(raw)
        content = until_closed(connection)
    assert content is not None and b" 400 " in content and b"without that header" in content
    with running.connection() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + asked + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")  # nothing is lost there
    with unguarded.connection() as connection:
        connection.sendall(raw)
        assert b"hello" not in connection.recv(4096)


@pytest.mark.parametrize(
    ("pieces", "answers"),
    [
        ((), 0),
        ((b"\r\n",), 0),
        ((ASK,), 1),
        ((ASK, b"\r\n"), 1),
        ((ASK.replace(b"/", b"/early", 1)[:-3], b"llo"), 1),
    ],
    ids=["nothing", "an empty line", "a request", "an empty line behind a request", "a body that nobody reads"],
)
def test_who_says_nothing_more_is_not_kept(running: Running, pieces: tuple[bytes, ...], answers: int) -> None:
    with running.connection() as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)
        content = until_closed(connection, 1.5)
    assert content is not None and content.count(b" 200 OK") == answers


def test_who_does_not_read_the_answer_is_cut_off(running: Running, unguarded: Running) -> None:
    """20 MB are more than the buffers of both ends."""

    def closed(server: Running, wait_s: float) -> bool:
        with server.connection() as connection:
            server.application.left.clear()
            connection.sendall(ASK.replace(b"/", b"/20000000", 1))
            assert server.application.left.wait(5) and server.open
            until = time.monotonic() + wait_s
            while server.open and time.monotonic() < until:
                time.sleep(0.02)
            return not server.open

    assert closed(running, 5)
    assert not closed(unguarded, 2 * LIMITS.write_s)


def test_who_reads_slowly_is_not(running: Running) -> None:
    """For longer than a client may leave an answer unread, but never for so long at once."""
    with running.connection() as connection:
        connection.sendall(ASK.replace(b"/", b"/3000000", 1))
        size = 0
        while size < 3_000_000:
            block = connection.recv(200_000)
            assert block
            size += len(block)
            time.sleep(0.02)
    assert size >= 3_000_000
