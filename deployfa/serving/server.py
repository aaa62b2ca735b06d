"""Run the application under uvicorn: listen, load, answer, and leave nobody without an answer at the end."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import ssl
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from deployfa.bundle import Bundle
from deployfa.errors import InputError, RequestError
from deployfa.serving.app import make_app
from deployfa.serving.connection import guarded
from deployfa.serving.fair_queue import Policy
from deployfa.serving.limits import Limits
from deployfa.serving.logs import start_logging, stop_logging
from deployfa.serving.memory import return_large_blocks
from deployfa.serving.metrics import Metrics
from deployfa.serving.opening import ModelOpener, Running
from deployfa.serving.repository import Repository
from deployfa.serving.service import Access, Service

__all__ = ["ServeOptions", "Tls", "serve"]

#: How long a thread may keep Python to itself while another wants it.  The usual 5 ms are a small model's run.
_SWITCH_S = 0.0005
#: For how long a stopping server still takes requests, and says with each answer that the connection ends.
_LAST_CALL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Paths of PEM files.  ``client_ca``: clients must show a certificate that it has signed (mutual TLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """``bundles``: name → directory; ``state``: see ``ModelOpener``; ``drain_s``: how long a stopping server waits for
    the answers that it owes."""

    bundles: Mapping[str, Path]
    host: str = "127.0.0.1"
    port: int = 8000
    running: Running = field(default_factory=Running)
    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    tls: Tls | None = None
    state: Path | None = None
    timeout_s: float = 60.0
    drain_s: float = 30.0
    cors_origins: Sequence[str] = ()
    metric_adapters: int = 100
    log_level: str = "info"


def serve(options: ServeOptions) -> int:
    """Until SIGTERM or Ctrl-C.  Returns the exit status: 0, or 1 if answers were still owed after ``drain_s``.

    Raises ``InputError`` for an address that cannot be listened on, for certificates that cannot be read, and for a
    bundle that cannot be served, ``BundleError`` for what is none.
    """
    _check_tls(options.tls)
    _check_bundles(options.bundles)
    listening = _listen(options)
    log = start_logging(options.log_level)
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    return_large_blocks()
    try:
        return asyncio.Runner(loop_factory=_loop_factory()).run(_serve(options, listening, log))
    finally:
        sys.setswitchinterval(before)
        listening.close()
        stop_logging()


async def _serve(options: ServeOptions, listening: socket.socket, log: Any) -> int:
    loop = asyncio.get_running_loop()
    metrics = Metrics(max_adapters=options.metric_adapters)
    executor = ThreadPoolExecutor(4, "deployfa-blocking")
    opener = ModelOpener(
        options.running,
        options.policy,
        state=options.state,
        loop=loop,
        executor=executor,
        observe=metrics.ran,
        log=log,
    )
    service = Service(
        repository=Repository(options.bundles, opener),
        metrics=metrics,
        limits=options.limits,
        access=options.access,
        executor=executor,
        timeout_s=options.timeout_s,
        log=log,
    )
    metrics.watch(service.repository)
    server = _Server(_config(options, service), service, options.drain_s)
    metrics.connections.set_function(lambda: len(server.server_state.connections))
    serving = loop.create_task(server.serve(sockets=[listening]))
    failed = await _load_all(service, listening, options, log, server)
    await serving
    owed = await _close(service, options.drain_s, log)
    if failed is not None:
        raise failed
    return 1 if owed or server.cut_off else 0


async def _load_all(
    service: Service, listening: socket.socket, options: ServeOptions, log: Any, server: _Server
) -> InputError | None:
    """One model after the other: each takes all cores to warm up."""
    scheme = "https" if options.tls is not None else "http"
    host, port = listening.getsockname()[:2]
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("listening", extra={"fields": {"url": url}})
    for name in service.repository.names():
        began = time.monotonic()
        try:
            await service.repository.load(name)
        except RequestError as error:
            log.error("model not loaded", extra={"fields": {"model": name, "error": str(error)}})
            server.should_exit = True
            return InputError(str(error))
        fields = {"model": name, "seconds": round(time.monotonic() - began, 3)}
        log.info("model loaded", extra={"fields": fields})
    # what is there now stays: there is nothing to collect in it
    gc.freeze()
    log.info("ready", extra={"fields": {"url": url, "models": service.repository.names()}})
    return None


async def _close(service: Service, drain_s: float, log: Any) -> bool:
    """Stop the models; True if one still owed answers."""
    owed = False
    for model in service.repository.loaded().values():
        if not await asyncio.to_thread(model.close, drain_s):
            owed = True
    service.executor.shutdown(wait=False, cancel_futures=True)
    log.info("stopped", extra={"fields": {"owed": owed}})
    return owed


class _Server(uvicorn.Server):
    """The first signal is the last call: readiness ends, what still arrives is answered, and each answer says that
    the connection closes.  The second one does not wait."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._last_call_s = min(_LAST_CALL_S, drain_s / 4)
        self._loop = asyncio.get_running_loop()
        self.cut_off = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.cut_off = True
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._loop.call_soon_threadsafe(self._last_call, signal.Signals(sig).name)

    def _last_call(self, sig: str) -> None:
        self._service.log.info("stopping", extra={"fields": {"signal": sig}})
        self.server_state.default_headers.append((b"connection", b"close"))
        self._loop.call_later(self._last_call_s, self._leave)

    def _leave(self) -> None:
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.cut_off = self.cut_off or bool(self.server_state.tasks)


def _config(options: ServeOptions, service: Service) -> uvicorn.Config:
    tls = options.tls
    secure: dict[str, Any] = {}
    if tls is not None:
        secure = {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
        if tls.client_ca is not None:
            secure |= {"ssl_ca_certs": str(tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return uvicorn.Config(
        make_app(service, cors_origins=options.cors_origins),
        http=guarded(options.limits),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(options.limits.idle_s),
        timeout_graceful_shutdown=max(1, int(options.drain_s)),
        **secure,
    )


def _listen(options: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(
            f"cannot listen on {options.host}:{options.port} ({error.strerror or error}); pass another --host or --port"
        ) from error


def _check_bundles(bundles: Mapping[str, Path]) -> None:
    """What is no bundle is said before anything listens; damaged files show when they are loaded."""
    for path in bundles.values():
        Bundle.open(path, check_files=False)


def _check_tls(tls: Tls | None) -> None:
    """What uvicorn would end the process for, as one line."""
    if tls is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"'{tls.certificate}' and '{tls.key}' cannot be used ({error}); pass a certificate and its key as PEM files"
        ) from error
    if tls.client_ca is not None:
        try:
            context.load_verify_locations(tls.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"'{tls.client_ca}' cannot be used ({error}); pass the certificate of who signs clients, a PEM file"
            ) from error


def _no_password() -> str:
    """Asked for a key that has one; else OpenSSL would ask whoever sits at the terminal, and wait."""
    raise InputError("the key of --tls-key has a password; pass one without: openssl pkey -in KEY -out PLAIN")


def _loop_factory() -> Any:
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
