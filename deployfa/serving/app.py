"""The whole server as one ASGI application: who may ask, the routes, and every error as one line of JSON."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Router

from deployfa.errors import RequestError
from deployfa.serving.http import Receive, Scope, Send, header, send_error
from deployfa.serving.routes import routes
from deployfa.serving.service import Service

__all__ = ["make_app"]

#: Answered without a token: whoever asks this must not need a secret.
_OPEN = ("/v2/health/live", "/v2/health/ready")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class _Application:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._router = Router(routes(service), redirect_slashes=False, default=_nothing_here)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RequestError(f"this server does not speak {scope['type']}; send HTTP requests")
        began = time.monotonic()
        told: dict[str, Any] = {"intake": self._service.intake}
        status = 0

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope["deployfa"] = told
        # Starlette raises HTTPException instead of answering in plain text where there is an application
        scope["app"] = self
        request_id = header_once(scope, b"x-request-id")
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex.encode()
        told["headers"] = [(b"x-request-id", request_id)]
        try:
            if scope["path"] not in _OPEN:
                self._service.access.check(scope)
            await self._router(scope, receive, sending)
        except RequestError as error:
            told["error"] = str(error)
            await self._refuse(error, told, status, sending)
        except HTTPException as error:
            refused = RequestError(
                f"{error.detail.lower()}: {scope['method']} {scope['path'][:200]}", error.status_code
            )
            told["error"] = str(refused)
            # which methods there are
            told["headers"] += [(key.lower().encode(), value.encode()) for key, value in (error.headers or {}).items()]
            await self._refuse(refused, told, status, sending)
        except Exception as error:
            told["error"] = f"{type(error).__name__}: {error}"
            self._service.log.error("request failed", exc_info=error, extra={"fields": self._fields(scope, told)})
            await self._refuse(RequestError("internal error; see the server's log", 500), told, status, sending)
        finally:
            self._service.intake.let_go(told)
            if self._service.log_requests and self._service.log.isEnabledFor(logging.INFO):
                # once the answer is on its way
                asyncio.get_running_loop().call_soon(self._tell, scope, told, status, time.monotonic() - began)

    def _tell(self, scope: Scope, told: dict[str, Any], status: int, seconds: float) -> None:
        fields = self._fields(scope, told) | {"status": status, "ms": round(1e3 * seconds, 3)}
        self._service.log.info("request", extra={"fields": fields})

    async def _refuse(self, error: RequestError, told: dict[str, Any], status: int, send: Send) -> None:
        if "counted" not in told:
            self._service.metrics.refused(error.status)
        # what has begun to be answered cannot be refused, and who is gone is not told
        if not status and error.status != 499:
            await send_error(send, error, headers=told["headers"])

    def _fields(self, scope: Scope, told: dict[str, Any]) -> dict[str, Any]:
        fields = {"request_id": told["headers"][0][1].decode(), "method": scope["method"], "path": scope["path"][:200]}
        client = scope.get("client")
        if client:
            fields["client"] = client[0]
        return fields | {key: value for key, value in told.items() if key not in ("headers", "counted", "intake")}


def make_app(service: Service, *, cors_origins: Sequence[str] = ()) -> Any:
    """``cors_origins``: web pages from there may ask, ``*`` for any; nobody by default."""
    app: Any = _Application(service)
    if cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Inference-Header-Content-Length", "X-Request-Id", "Retry-After"],
        )
    return app


def header_once(scope: Scope, name: bytes) -> bytes | None:
    try:
        return header(scope, name)
    except RequestError:
        return None


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise RequestError(f"nothing at {scope['path'][:200]}; the protocol's routes begin with /v2", 404)
