"""The bench's end of a worker: start it, ask it, never leave it behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

import deployfa
from deployfa.bench import protocol as say
from deployfa.errors import RuntimeTargetError

__all__ = ["WorkerProcess"]

Answer = TypeVar("Answer")

_STDERR_LINES = 3


class WorkerProcess:
    """A context manager around one process; leaving it, for whatever reason, ends the process.

    module: what the process runs, and answers with ``deployfa.bench.worker.serve``.

    start_ms: from asking the system for a process to its first word, Python's start-up and our imports included.
    """

    def __init__(
        self,
        label: str,
        *,
        threads: int,
        spinning: bool,
        timeout_s: float = 300.0,
        module: str = "deployfa.bench.worker",
    ) -> None:
        self.label = label
        self._timeout_s = timeout_s
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self._decoder = msgspec.json.Decoder(say.Reply)
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(threads=threads, spinning=spinning),
        )
        try:
            self._read(say.Ready, "starting")
        except BaseException:
            self.close()
            raise
        self.start_ms = 1e3 * (time.perf_counter() - start)

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: say.Request, expected: type[Answer]) -> Answer:
        """One request and its reply.  Raises ``RuntimeTargetError`` when the worker fails, dies or does not answer."""
        doing = type(request).__name__.lower()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(msgspec.json.encode(request) + b"\n")
            stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._died(doing) from None
        return self._read(expected, doing)

    def close(self) -> None:
        """End the process and wait for it; harmless when it has ended already."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:  # what was still to be written has no reader any more
                continue

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, expected: type[Answer], doing: str) -> Answer:
        stdout = self._process.stdout
        assert stdout is not None
        timer = threading.Timer(self._timeout_s, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            line = stdout.readline()
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if not line.endswith(b"\n"):
            raise self._died(doing, late=late)
        reply = self._decoder.decode(line)
        if isinstance(reply, say.Failed):
            raise RuntimeTargetError(f"contender '{self.label}': {reply.message}")
        if not isinstance(reply, expected):
            raise RuntimeTargetError(f"contender '{self.label}' answered {reply}; are two versions of deployfa mixed?")
        return reply

    def _died(self, doing: str, *, late: bool = False) -> RuntimeTargetError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        if late:
            how = f"did not answer within {self._timeout_s:g} s"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()[-_STDERR_LINES:]
        last = " | ".join(line.strip() for line in said) or "nothing"
        return RuntimeTargetError(
            f"the worker of contender '{self.label}' {how} during '{doing}'; its last words: {last}"
        )


def _environment(*, threads: int, spinning: bool) -> dict[str, str]:
    """The same thread settings for every runtime in the worker, and the same deployfa as ours."""
    environment = dict(os.environ)
    root = str(Path(deployfa.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    environment["OMP_NUM_THREADS"] = str(threads)
    if spinning:
        environment.pop("OMP_WAIT_POLICY", None)
    else:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return environment
