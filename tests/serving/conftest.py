"""A real server in a process of its own, with every kind of bundle that it serves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ADMIN = "the-admin-token"


@dataclass
class Served:
    """``url`` without a slash at the end; ``lines``: the log so far, one object a line."""

    url: str
    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    admin: str = ADMIN

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.split("//")[1].split(":")
        return host, int(port)

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, decoded JSON (bytes if it is none), headers; ``body``: bytes, or what becomes JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, content, got = answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            status, content, got = error.code, error.read(), dict(error.headers)
        got = {name.lower(): value for name, value in got.items()}
        try:
            return status, json.loads(content), got
        except ValueError:
            return status, content, got

    def answer(self, model: str, text: str, **parameters: Any) -> Any:
        """The answer to one sentence; asserts that there is one."""
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]
        status, answer, _ = self.ask(f"/v2/models/{model}/infer", {"inputs": inputs, "parameters": parameters})
        assert status == 200, answer
        return {output["name"]: output["data"] for output in answer["outputs"]}

    def stop(self, how: int = signal.SIGTERM, timeout: float = 30) -> int:
        """The exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(timeout)


Serve = Callable[..., contextlib.AbstractContextManager[Served]]


@contextlib.contextmanager
def serving(*arguments: object, env: dict[str, str] | None = None) -> Iterator[Served]:
    """``deployfa serve`` on a free port, ready; killed at the end if it still runs."""
    command = [sys.executable, "-m", "deployfa.cli", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    lines: list[dict[str, Any]] = []
    raw: list[str] = []

    def read() -> None:
        for line in process.stderr or ():
            raw.append(line)
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        until = time.monotonic() + 60
        while not any(line["event"] == "ready" for line in lines):
            assert process.poll() is None and time.monotonic() < until, "".join(raw)
            time.sleep(0.02)
        url = next(line["url"] for line in lines if line["event"] == "ready")
        yield Served(url, process, lines)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5)


@pytest.fixture(scope="session")
def serve() -> Serve:
    """``with serve("pack.bundle", "--max-batch", 4) as served:``"""
    return serving


@pytest.fixture(scope="session")
def packs(shared: Path, trained: dict[str, Path]) -> dict[str, Path]:
    """``pack``: vefa and lorfa, their tables as inputs; ``baked``: the same in the graph.  Do not write into them."""
    from deployfa.adapter import Adapter
    from deployfa.pack import pack

    found = {"pack": shared / "served-pack", "baked": shared / "served-baked"}
    with FileLock(shared / "served.lock"):
        for name, path in found.items():
            if not path.is_dir():
                adapters = {method: Adapter.load(trained[method]) for method in ("vefa", "lorfa")}
                pack(adapters, path, optimize="ort", table_inputs=name == "pack")
    return found


@pytest.fixture(scope="module")
def served(
    packs: dict[str, Path],
    bundles: dict[str, Path],
    slot_bundles: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """Models ``pack``, ``baked``, ``folded``, ``slots``; changes with the bearer token ``served.admin``."""
    models = {**packs, "folded": bundles["folded"], "slots": slot_bundles["vefa"]}
    state = tmp_path_factory.mktemp("state")
    with serving(
        *(f"{name}={path}" for name, path in models.items()), "--state", state, env={"DEPLOYFA_ADMIN_TOKEN": ADMIN}
    ) as running:
        yield running
