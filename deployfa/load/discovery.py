"""What a server says about itself: its models, their inputs, their adapters.

Open Inference Protocol v2, REST: ``GET /v2``, ``POST /v2/repository/index``, ``GET /v2/models/M``; and
``GET /v2/models/M/adapters``, which is deployfa's.  Answers come from strangers: they are checked against a type.
"""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import quote

import msgspec

from deployfa.errors import InputError, LoadError
from deployfa.load.client import Client, Reply

__all__ = ["ServerInfo", "TensorInfo", "find_model", "model_inputs", "model_path", "served_adapters", "server_info"]

_JSON = {"Content-Type": "application/json"}
T = TypeVar("T")


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Name and version that the server gives itself; empty where it does not say."""

    name: str = ""
    version: str = ""


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An input of a model; -1 in ``shape`` is a dimension that a request chooses."""

    name: str
    datatype: str
    shape: list[int]


class _Listed(msgspec.Struct):
    name: str
    state: str = ""


class _Model(msgspec.Struct):
    inputs: list[TensorInfo] = []


class _Adapter(msgspec.Struct):
    name: str


class _Adapters(msgspec.Struct):
    adapters: list[_Adapter]


def model_path(model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}"


async def server_info(client: Client) -> ServerInfo:
    """Raises ``LoadError`` where nobody answers, or wants a token."""
    reply = await client.ask("GET", "/v2")
    _check_token(client, reply)
    if reply.status != 200:
        return ServerInfo()
    return _decode(client, "/v2", reply, ServerInfo)


async def find_model(client: Client, wanted: str | None) -> str:
    """The model to ask: ``wanted``, or the only one that is ready.

    Raises ``InputError`` when there is none, or several to choose from.
    """
    reply = await client.ask("POST", "/v2/repository/index", body=b"{}", headers=_JSON)
    _check_token(client, reply)
    if reply.status != 200:
        if wanted is not None:
            return wanted
        raise InputError(
            f"{client.base_url} does not list its models (HTTP {reply.status}: {reply.text}); pass --model, or "
            "check that it speaks the Open Inference Protocol"
        )
    listed = _decode(client, "/v2/repository/index", reply, list[_Listed])
    ready = sorted({each.name for each in listed if each.state == "READY"})
    if wanted is not None:
        if listed and wanted not in {each.name for each in listed}:
            raise InputError(
                f"no model '{wanted}' at {client.base_url}; it has: {', '.join(ready) or 'none that is ready'}"
            )
        return wanted
    if len(ready) == 1:
        return ready[0]
    if ready:
        raise InputError(f"{client.base_url} has {len(ready)} models; pass --model with one of: {', '.join(ready)}")
    waiting = ", ".join(sorted(f"{each.name} ({each.state or 'no state'})" for each in listed)) or "it lists none"
    raise InputError(f"no model at {client.base_url} is ready ({waiting}); wait for one, or load one")


async def model_inputs(client: Client, model: str) -> list[TensorInfo]:
    """Raises ``InputError`` where the server knows no such model."""
    reply = await client.ask("GET", model_path(model))
    if reply.status != 200:
        raise InputError(
            f"{client.base_url} does not describe model '{model}' (HTTP {reply.status}: {reply.text}); check --model"
        )
    return _decode(client, model_path(model), reply, _Model).inputs


async def served_adapters(client: Client, model: str) -> list[str] | None:
    """Names in the server's order; ``None`` where the server has no such list."""
    path = model_path(model) + "/adapters"
    reply = await client.ask("GET", path)
    if reply.status == 404:
        return None
    if reply.status != 200:
        raise LoadError(
            f"{client.base_url} does not list the adapters of '{model}' (HTTP {reply.status}: {reply.text}); "
            "leave out --adapters, or look at the server"
        )
    return [each.name for each in _decode(client, path, reply, _Adapters).adapters]


def _check_token(client: Client, reply: Reply) -> None:
    if reply.status in (401, 403):
        raise LoadError(f"{client.base_url} wants another token (HTTP {reply.status}: {reply.text}); pass --token")


def _decode(client: Client, path: str, reply: Reply, kind: type[T]) -> T:
    try:
        # strict off: some servers write the numbers of a shape as strings
        return msgspec.json.decode(reply.body, type=kind, strict=False)
    except msgspec.DecodeError as error:
        raise LoadError(
            f"{client.base_url}{path} does not answer in the Open Inference Protocol ({error}); check the address"
        ) from error
