"""Every route but ``infer``: health, metadata, the repository, adapters, and what Triton's clients ask besides."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.routing import Route

import deployfa
from deployfa.errors import InputError, RequestError
from deployfa.serving.adapters import AdapterRegistry
from deployfa.serving.describe import configuration, metadata
from deployfa.serving.http import Receive, Scope, Send, read_body, send_answer, send_json
from deployfa.serving.infer import Infer
from deployfa.serving.log_settings import change_log, shown_log
from deployfa.serving.model import VERSION, ServedModel
from deployfa.serving.service import Service
from deployfa.tables.checks import BASE

__all__ = ["routes"]

EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "statistics",
    "logging",
]
Answer = Callable[[Scope, Receive], Awaitable[Any]]
_NO_SHARED_MEMORY = "this server takes no shared memory; send tensors in the request"
_FILE = "file:adapters/"


class _Json:
    """An ASGI application that answers with what ``answer`` returns, as JSON; ``None`` is an empty body."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = await self._answer(scope, receive)
        if value is None:
            await send_answer(send, [b""], headers=scope["deployfa"]["headers"])
        else:
            await send_json(send, value, headers=scope["deployfa"]["headers"])


class _Routes:
    """``scope["path_params"]`` holds what stands in the braces of a path."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def of_model(self, scope: Scope) -> ServedModel:
        asked = scope["path_params"]
        scope["deployfa"]["model"] = asked["model"]
        return self.service.model(asked["model"], asked.get("version"))

    async def server(self, scope: Scope, receive: Receive) -> Any:
        return {"name": "deployfa", "version": deployfa.__version__, "extensions": EXTENSIONS}

    async def live(self, scope: Scope, receive: Receive) -> Any:
        return None

    async def ready(self, scope: Scope, receive: Receive) -> Any:
        reason = self.service.not_ready()
        if reason is not None:
            raise RequestError(reason, 503, retry_after_s=1.0)

    async def model(self, scope: Scope, receive: Receive) -> Any:
        return metadata(self.of_model(scope))

    async def model_ready(self, scope: Scope, receive: Receive) -> Any:
        model = self.of_model(scope)
        reason = "the server is stopping" if self.service.draining else model.reason
        if reason is not None:
            raise RequestError(f"model '{model.name}' is not ready: {reason}", 503, retry_after_s=1.0)

    async def config(self, scope: Scope, receive: Receive) -> Any:
        return configuration(self.of_model(scope))

    async def stats(self, scope: Scope, receive: Receive) -> Any:
        if "model" in scope["path_params"]:
            models = [self.of_model(scope)]
        else:
            models = list(self.service.repository.loaded().values())
        return {"model_stats": [model.statistics.shown(model.name, VERSION) for model in models]}

    async def index(self, scope: Scope, receive: Receive) -> Any:
        asked = await self._object(scope, receive)
        return self.service.repository.index(ready=bool(asked.get("ready", False)))

    async def load(self, scope: Scope, receive: Receive) -> Any:
        """The bundle again from its directory; with ``file:adapters/NAME`` parameters these adapters instead."""
        self.service.access.check_admin(scope)
        name = scope["path_params"]["model"]
        parameters = (await self._object(scope, receive)).get("parameters", {})
        files = {key: value for key, value in parameters.items() if key.startswith("file:")}
        wrong = next((key for key in files if not key.startswith(_FILE)), None)
        if wrong is not None:
            raise RequestError(f"'{wrong[:80]}' cannot be loaded; send adapters, as {_FILE}NAME.safetensors")
        _check_config(parameters.get("config"))
        if not files:
            await self.service.repository.load(name)
            return None
        # all of them are read before one of them counts
        for key, content in {key: _decoded(key, content) for key, content in files.items()}.items():
            adapter = key.removeprefix(_FILE)
            adapter = adapter.removesuffix(".safetensors").removesuffix(".pt").removesuffix(".onnx_adapter")
            await self._put(name, adapter, content)
        return None

    async def unload(self, scope: Scope, receive: Receive) -> Any:
        self.service.access.check_admin(scope)
        await self._object(scope, receive)
        await self.service.repository.unload(scope["path_params"]["model"])

    async def adapters(self, scope: Scope, receive: Receive) -> Any:
        model = self.of_model(scope)
        found = await self._blocking(model.registry.list) if model.registry is not None else []
        return {"model": model.name, "adapters": [each for each in found if each.name != BASE]}

    async def put_adapter(self, scope: Scope, receive: Receive) -> Any:
        self.service.access.check_admin(scope)
        model = self.of_model(scope)
        content = await read_body(scope, receive, self.service.limits)
        return await self._put(model.name, scope["path_params"]["adapter"], content)

    async def _put(self, model: str, adapter: str, content: bytes) -> Any:
        async with self.service.repository.changing(model):
            registry = _registry(self.service.model(model, None))
            try:
                return await self._blocking(registry.load, adapter, content, _suffix(content))
            except RequestError:
                raise
            except Exception as error:
                raise _refused(error) from error

    async def delete_adapter(self, scope: Scope, receive: Receive) -> Any:
        self.service.access.check_admin(scope)
        model = self.of_model(scope)
        async with self.service.repository.changing(model.name):
            registry = _registry(self.service.model(model.name, None))
            try:
                await self._blocking(registry.unload, scope["path_params"]["adapter"])
            except InputError as error:
                raise RequestError(str(error), 404) from error
        return {"unloaded": scope["path_params"]["adapter"]}

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = await self._blocking(self.service.metrics.text)
        headers = [
            (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),
            (b"content-length", b"%d" % len(text)),
            *scope["deployfa"]["headers"],
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": False})

    async def logging(self, scope: Scope, receive: Receive) -> Any:
        service = self.service
        if scope["method"] == "POST":
            service.access.check_admin(scope)
            asked = await self._object(scope, receive)
            service.log_requests = change_log(service.log, asked, requests=service.log_requests)
        return shown_log(service.log, requests=service.log_requests)

    async def trace(self, scope: Scope, receive: Receive) -> Any:
        """Traces are not taken: always off."""
        if "model" in scope["path_params"]:
            self.of_model(scope)
        if scope["method"] == "POST":
            self.service.access.check_admin(scope)
            level = (await self._object(scope, receive)).get("trace_level")
            if level not in (None, "OFF", ["OFF"]):
                raise RequestError("this server takes no traces; use request ids in the log, and /metrics")
        return {"trace_level": ["OFF"], "trace_rate": "0", "trace_count": "0", "log_frequency": "0", "trace_file": ""}

    async def shared_memory(self, scope: Scope, receive: Receive) -> Any:
        """None can be registered, so there is none, and to unregister all of it succeeds."""
        if scope["path"].endswith("/status"):
            if "region" in scope["path_params"]:
                raise RequestError(f"no region '{scope['path_params']['region'][:80]}'; {_NO_SHARED_MEMORY}", 404)
            return []
        if scope["path"].endswith("/register"):
            raise RequestError(_NO_SHARED_MEMORY)
        return None

    async def _object(self, scope: Scope, receive: Receive) -> dict[str, Any]:
        """The JSON object of a body, empty for none."""
        body = await read_body(scope, receive, self.service.limits)
        if not body.strip():
            return {}
        try:
            asked = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"the body is no JSON object: {str(error)[:200]}") from error
        parameters = asked.get("parameters", {})
        if not isinstance(parameters, dict):
            raise RequestError("'parameters' is no object; send {\"parameters\": {...}}")
        return asked

    async def _blocking(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.service.executor, function, *arguments)


def routes(service: Service) -> list[Route]:
    """The first that matches answers; what is asked most stands first."""
    own = _Routes(service)
    infer = Infer(service)
    get, post = ["GET"], ["POST"]
    both = ["GET", "POST"]

    def each(path: str, answer: Answer, methods: list[str]) -> Route:
        return Route(path, _Json(answer), methods=methods)

    def versions(path: str, answer: Answer) -> list[Route]:
        return [
            each("/v2/models/{model}" + path, answer, get),
            each("/v2/models/{model}/versions/{version}" + path, answer, get),
        ]

    return [
        Route("/v2/models/{model}/infer", infer, methods=post),
        Route("/v2/models/{model}/versions/{version}/infer", infer, methods=post),
        each("/v2/health/live", own.live, get),
        each("/v2/health/ready", own.ready, get),
        each("/v2", own.server, get),
        each("/v2/models/stats", own.stats, get),
        *versions("", own.model),
        *versions("/ready", own.model_ready),
        *versions("/config", own.config),
        *versions("/stats", own.stats),
        each("/v2/repository/index", own.index, post),
        each("/v2/repository/models/{model}/load", own.load, post),
        each("/v2/repository/models/{model}/unload", own.unload, post),
        each("/v2/models/{model}/adapters", own.adapters, get),
        each("/v2/models/{model}/adapters/{adapter:path}", own.put_adapter, ["PUT"]),
        each("/v2/models/{model}/adapters/{adapter:path}", own.delete_adapter, ["DELETE"]),
        Route("/metrics", _Plain(own.metrics), methods=get),
        each("/v2/logging", own.logging, both),
        each("/v2/trace/setting", own.trace, both),
        each("/v2/models/{model}/trace/setting", own.trace, both),
        *(
            each(f"/v2/{kind}sharedmemory{path}", own.shared_memory, methods)
            for kind in ("system", "cuda")
            for path, methods in (
                ("/status", get),
                ("/region/{region}/status", get),
                ("/region/{region}/register", post),
                ("/unregister", post),
                ("/region/{region}/unregister", post),
            )
        ),
    ]


class _Plain:
    """A method as an ASGI application: Starlette takes a bare function for one of its own kind."""

    def __init__(self, answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


def _registry(model: ServedModel) -> AdapterRegistry:
    if model.registry is None:
        raise RequestError(f"model '{model.name}' is one adapter; serve a pack made with --table-inputs, or --slots")
    return model.registry


def _refused(error: Exception) -> Exception:
    """What the client sent is wrong, unless it is our disk."""
    from deployfa.errors import DeployfaError, StorageError

    if isinstance(error, DeployfaError):
        return RequestError(str(error), 503 if isinstance(error, StorageError) else 400)
    return error


def _check_config(config: Any) -> None:
    """Triton's clients must send one along with files; it says nothing that a bundle does not say."""
    try:
        empty = config is None or msgspec.json.decode(config, type=dict[str, Any]) == {}
    except (TypeError, msgspec.MsgspecError, UnicodeError, RecursionError):
        empty = False
    if not empty:
        raise RequestError("'config' cannot be overridden: the bundle says what the model is; send '{}' or none")


def _suffix(content: bytes) -> str:
    if content[:2] == b"PK":
        return ".pt"
    return ".onnx_adapter" if content[4:8] == b"TORT" else ".safetensors"


def _decoded(key: str, content: Any) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise RequestError(f"'{key[:80]}' is not base64; send the file's bytes so") from error
