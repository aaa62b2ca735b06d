"""``serve(...)``: a server with these settings, up until the test ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .server import Server, serving


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(Server(**settings)))


@pytest.fixture(autouse=True)
def glance(monkeypatch: pytest.MonkeyPatch) -> None:
    """How busy the machine is, is watched for less long; tests/bench/test_machine.py is about that."""
    monkeypatch.setattr("deployfa.bench.machine._WATCH_S", 0.02)


@pytest.fixture
def quick() -> dict[str, Any]:
    """Options of a run that is over soon."""
    return {"rate": 200, "duration": 0.25, "warmup": 0, "timeout": 5}
