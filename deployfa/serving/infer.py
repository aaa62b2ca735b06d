"""``POST /v2/models/M[/versions/V]/infer``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from deployfa.errors import RequestError
from deployfa.serving.batcher import Closed
from deployfa.serving.compression import accepted_encoding
from deployfa.serving.http import Receive, Scope, Send, header, read_body, send_answer
from deployfa.serving.model import VERSION, Inference, ServedModel
from deployfa.serving.request import InferRequest, WantedOutput, parse_request
from deployfa.serving.response import encode_response
from deployfa.serving.service import Service
from deployfa.serving.text import LABEL, SCORE

__all__ = ["Infer"]

#: After how many seconds without an answer it is worth to watch whether the client is still there.
_WATCH_AFTER_S = 0.02


class Infer:
    """An ASGI application."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        arrived = time.monotonic()
        asked = scope["path_params"]
        name, version = asked["model"], asked.get("version")
        # unknown models are refused before their tensors are read
        model = service.model(name, version)
        told: dict[str, Any] = scope["deployfa"]
        told["model"] = name
        body = await read_body(scope, receive, service.limits)
        adapter = ""
        try:
            request = parse_request(body, header(scope, b"inference-header-content-length"), service.limits)
            adapter = _named(request.parameters)
            wanted = _wanted(model, request)
            deadline = arrived + _timeout(request.parameters, service.timeout_s)
            gone = _Gone(receive)
            try:
                try:
                    inference = await model.infer(request, arrived=arrived, deadline=deadline, gone=gone.future)
                except Closed:
                    # it was loaded again since; the one in its place answers
                    model = service.model(name, version)
                    inference = await model.infer(request, arrived=arrived, deadline=deadline, gone=gone.future)
            finally:
                gone.close()
            began = time.monotonic()
            pieces, json_length = _encoded(model, request, inference, wanted)
        except RequestError as error:
            model.statistics.failed(time.monotonic() - arrived)
            # a name that there is not is no series of its own
            service.metrics.failed(name, adapter if error.status not in (400, 404) else "", error.status)
            told["counted"] = True
            raise
        encoding = _response_encoding(scope)
        await send_answer(send, pieces, json_length=json_length, encoding=encoding, headers=told["headers"])
        # counted once the answer is on its way, which it is when the loop comes round again
        asyncio.get_running_loop().call_soon(self._count, model, inference, arrived, began, time.monotonic())
        told |= {
            "adapter": inference.adapter,
            "rows": inference.rows,
            "batch_rows": inference.answered.batch_rows,
            "queue_ms": round(1e3 * inference.answered.queue_s, 3),
            "compute_ms": round(1e3 * inference.answered.compute_s, 3),
        }

    def _count(self, model: ServedModel, inference: Inference, arrived: float, began: float, done: float) -> None:
        model.statistics.answered(inference.answered, inference.rows, done - arrived, done - began)
        self._service.metrics.answered(
            model.name, inference.adapter, inference.answered, inference.rows, done - arrived
        )


class _Gone:
    """``future`` is done when the client is gone; nothing is watched until the answer takes its time."""

    def __init__(self, receive: Receive) -> None:
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = loop.create_future()
        self._receive = receive
        self._task: asyncio.Task[None] | None = None
        self._timer = loop.call_later(_WATCH_AFTER_S, self._start)

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self.future.done():
            self.future.set_result(None)

    def close(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        self.future.cancel()


def _encoded(
    model: ServedModel, request: InferRequest, inference: Inference, wanted: list[WantedOutput]
) -> tuple[list[bytes], int | None]:
    outputs: Mapping[str, Any] = inference.outputs
    if model.classifies and any(each.name in (LABEL, SCORE) for each in wanted):
        outputs = {**outputs, **model.label(inference)}
    return encode_response(
        model.name, VERSION, request.id, outputs, wanted, adapter=inference.adapter, labels=inference.labels
    )


def _wanted(model: ServedModel, request: InferRequest) -> list[WantedOutput]:
    known = model.outputs
    if request.outputs is None:
        return [WantedOutput(name, request.binary) for name in known]
    for each in request.outputs:
        if each.name not in known:
            raise RequestError(f"'{each.name[:80]}' is no output; the outputs: {', '.join(known)}")
    return request.outputs


def _timeout(parameters: Mapping[str, Any], longest_s: float) -> float:
    """Seconds; the protocol's parameter ``timeout`` is in microseconds."""
    timeout = parameters.get("timeout")
    if timeout is None or timeout == 0:
        return longest_s
    if type(timeout) is not int or timeout < 0:
        raise RequestError(f"parameter 'timeout' is {str(timeout)[:40]}; send microseconds, a whole number")
    return min(timeout / 1e6, longest_s)


def _named(parameters: Mapping[str, Any]) -> str:
    adapter = parameters.get("adapter")
    return adapter if isinstance(adapter, str) else ""


def _response_encoding(scope: Scope) -> str | None:
    accepted = header(scope, b"accept-encoding")
    return accepted_encoding(accepted.decode("latin-1")) if accepted is not None else None
