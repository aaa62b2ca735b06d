"""The HTTP client: keep-alive connections, one attempt a request, every failure a number."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from deployfa.errors import LoadError, MissingExtraError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Client", "Outcome", "Reply", "kind_of", "open_client"]

SendBytes = Callable[[bytes, Mapping[str, str]], Awaitable[tuple[int, float]]]

#: uvicorn closes a connection that was idle for 5 s; a request must not meet one that is being closed.
_KEEP_ALIVE_S = 4.0
_OPEN_FILES = 65536


class Outcome(IntEnum):
    """What became of a request that has no HTTP status to tell it; any other outcome is the status."""

    UNFINISHED = 0
    TIMEOUT = -1
    CONNECTION = -2
    SHED = -3
    OK = 200


def kind_of(outcome: int) -> str:
    """``timeout``, ``connection``, or the status as text."""
    return {int(Outcome.TIMEOUT): "timeout", int(Outcome.CONNECTION): "connection"}.get(outcome, str(outcome))


@dataclass(frozen=True)
class Reply:
    """An answer to a question about the server.  text: what it said, as far as it is text."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        """The ``error`` of a JSON answer, else its beginning, at most 200 characters."""
        said = self.body[:4000].decode("utf-8", "replace")
        with contextlib.suppress(ValueError):
            value = json.loads(self.body)
            if isinstance(value, dict) and isinstance(value.get("error"), str):
                said = value["error"]
        return " ".join(said.split())[:200] or "no reason given"


class Client:
    """One session; ``base_url`` as in ``LoadOptions``."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, *, timeout: float) -> None:
        from yarl import URL

        self.base_url = base_url
        self._session = session
        self._timeout = timeout
        self._url = URL

    async def ask(
        self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One question about the server.  Raises ``LoadError`` where nobody answers."""
        import aiohttp

        url = self._url(self.base_url + path, encoded=True)
        try:
            async with self._session.request(
                method, url, data=body, headers=headers, allow_redirects=False
            ) as response:
                return Reply(response.status, await response.read())
        except TimeoutError:
            raise LoadError(
                f"{self.base_url} did not answer within {self._timeout:g} s; look at the server, or raise --timeout"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise LoadError(
                f"no server at {self.base_url} ({str(error) or type(error).__name__}); check the address, or start one"
            ) from error

    def sender(self, path: str) -> SendBytes:
        """The function ``send(body, headers)`` → (outcome, seconds that it waited here for a free connection)."""
        import aiohttp

        url, session = self._url(self.base_url + path, encoded=True), self._session
        failures = (aiohttp.ClientError, OSError)

        async def send(body: bytes, headers: Mapping[str, str]) -> tuple[int, float]:
            queued = [0.0]
            outcome: int
            try:
                async with session.post(
                    url, data=body, headers=headers, allow_redirects=False, trace_request_ctx=queued
                ) as response:
                    await response.read()
                    outcome = response.status
                    if outcome == 503 and "Retry-After" in response.headers:
                        outcome = Outcome.SHED
            except TimeoutError:
                outcome = Outcome.TIMEOUT
            except failures:
                outcome = Outcome.CONNECTION
            waited = queued[0]
            return outcome, waited if waited >= 0 else waited + time.perf_counter()  # it ended while still in the queue

        return send


@contextlib.asynccontextmanager
async def open_client(
    base_url: str, *, token: str | None, timeout: float, max_connections: int | None
) -> AsyncIterator[Client]:
    """A client whose connections are closed at the end.  Raises ``MissingExtraError`` without aiohttp."""
    try:
        import aiohttp
    except ImportError as error:
        raise MissingExtraError("aiohttp", "serve", "sending load") from error
    _allow_open_files()
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_connections or 0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=timeout),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Authorization": f"Bearer {token}"} if token else {},
        auto_decompress=False,
        # tracing costs time on every request, and without a limit nothing is queued
        trace_configs=[_time_in_queue()] if max_connections else [],
    ) as session:
        yield Client(session, base_url, timeout=timeout)


def _time_in_queue() -> aiohttp.TraceConfig:
    """Adds up, in the list that a request brings along, the seconds for which it waited for a free connection."""
    import aiohttp

    async def start(_session: Any, context: Any, _parameters: Any) -> None:
        context.trace_request_ctx[0] -= time.perf_counter()

    async def end(_session: Any, context: Any, _parameters: Any) -> None:
        context.trace_request_ctx[0] += time.perf_counter()

    config = aiohttp.TraceConfig()
    config.on_connection_queued_start.append(start)
    config.on_connection_queued_end.append(end)
    return config


def _allow_open_files() -> None:
    """A stalled server holds a connection for every request sent meanwhile; the usual limit is 1024 files."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
