"""One contender in a process of its own: ``python -m deployfa.bench.worker PARENT_PID``.

Requests come in on stdin, replies leave on what stdout was at the start; what libraries print goes to stderr.  The
worker ends when stdin closes, and on Linux is killed with the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec

from deployfa.bench import protocol as say
from deployfa.bench.contender import Shape
from deployfa.bench.feeds import make_feeds
from deployfa.edits import Array
from deployfa.errors import DeployfaError, RuntimeTargetError
from deployfa.runtimes.runner import Runner, TensorSpec

__all__ = ["Answers", "Worker", "main", "peak_memory_bytes", "serve", "settle"]

_WINDOW_MS = 50.0  # a warm-up window is at least this long and this many runs
_WINDOW_RUNS = 5
_STEADY = 0.03
_TOKEN_INPUTS = ("input_ids", "attention_mask")


class Worker:
    """Answers requests one at a time; holds the contender's runner and the feeds of the current shape."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._opened: say.Open | None = None
        self._feeds: dict[str, Array] = {}

    def answer(self, request: say.Request) -> say.Reply:
        """Raises whatever the contender raises."""
        match request:
            case say.Open():
                return self._open(request)
            case say.Prepare():
                return self._prepare(request)
            case say.Warm():
                return self._warm(request.max_ms)
            case say.Run():
                return self._block(request.count)
            case say.Memory():
                return say.Memorised(peak_memory_bytes())
            case say.Count():
                return self._count()
            case _:
                raise RuntimeTargetError(f"this worker times single runs; {type(request).__name__} is for another one")

    def _open(self, request: say.Open) -> say.Opened:
        build = _load_graph if request.kind == "onnx" else _load_module
        start = time.perf_counter()
        make = build(request)
        imported = time.perf_counter()
        self._runner, inputs = make()
        self._opened = request
        done = time.perf_counter()
        return say.Opened(import_ms=1e3 * (imported - start), session_ms=1e3 * (done - imported), inputs=inputs)

    def _prepare(self, request: say.Prepare) -> say.Prepared:
        runner = self._need()
        wanted = self._inputs(runner)
        shape = Shape(request.batch, request.sequence)
        adapters = self._opened.adapters if self._opened is not None else 0
        self._feeds = make_feeds(wanted, shape, seed=request.seed, vocabulary=request.vocabulary, adapters=adapters)
        return say.Prepared(self._once(runner))

    def _inputs(self, runner: Runner) -> tuple[TensorSpec, ...]:
        """A module's own specs are a convention; those of the graph beside it say more."""
        beside = {spec.name: spec for spec in self._opened.inputs} if self._opened is not None else {}
        return tuple(beside.get(spec.name, spec) for spec in runner.inputs)

    def _warm(self, max_ms: float) -> say.Warmed:
        runner = self._need()
        start = time.perf_counter()
        runs, before = 0, 0.0
        while True:
            window: list[float] = []
            while sum(window) < _WINDOW_MS or len(window) < _WINDOW_RUNS:
                window.append(self._once(runner))
            runs += len(window)
            median = statistics.median(window)
            if before and abs(median - before) <= _STEADY * before:
                return say.Warmed(median, runs, True)
            if 1e3 * (time.perf_counter() - start) > max_ms:
                return say.Warmed(median, runs, False)
            before = median

    def _block(self, count: int) -> say.Block:
        """The first run of a block meets the caches as another contender left them; it is made and not counted."""
        runner = self._need()
        gc.disable()
        try:
            self._once(runner)
            samples = [self._once(runner) for _ in range(count)]
        finally:
            gc.enable()
        settle()
        return say.Block(samples)

    def _count(self) -> say.Counted:
        from deployfa.bench import flops

        runner, opened = self._need(), self._opened
        if opened is not None and opened.graph is not None:
            found = flops.count_graph_flops(Path(opened.graph), self._feeds)
        else:
            found = flops.count_module_flops(lambda: runner.run(self._feeds))
        return say.Counted(found.flops, found.reason)

    def _once(self, runner: Runner) -> float:
        start = time.perf_counter_ns()
        runner.run(self._feeds)
        return (time.perf_counter_ns() - start) / 1e6

    def _need(self) -> Runner:
        if self._runner is None:
            raise RuntimeTargetError("the worker was asked to run before it was given a contender; open one first")
        return self._runner


def peak_memory_bytes() -> int | None:
    """The most memory this process ever held.

    Linux: VmHWM, which starts anew with the program, where getrusage's figure inherits that of the process that
    started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


class Answers(Protocol):
    """What a worker's process is about."""

    def answer(self, request: say.Request) -> say.Reply: ...


def main() -> int:
    """Serve stdin until it closes."""
    return serve(Worker())


def serve(worker: Answers) -> int:
    """Let ``worker`` answer stdin until it closes; an error is an answer too."""
    _die_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    requests, replies = _take_streams()
    decoder, encode = msgspec.json.Decoder(say.Request), msgspec.json.encode

    def send(reply: say.Reply) -> None:
        replies.write(encode(reply) + b"\n")
        replies.flush()

    send(say.Ready())
    for line in requests:
        try:
            reply = worker.answer(decoder.decode(line))
        except DeployfaError as error:
            reply = say.Failed(str(error))
        except Exception as error:
            text = str(error).strip().splitlines()
            reply = say.Failed(f"{type(error).__name__}: {text[0] if text else 'no message'}")
        send(reply)
    return 0


def _load_graph(request: say.Open) -> Callable[[], tuple[Runner, tuple[TensorSpec, ...]]]:
    from deployfa.runtimes.providers import PROVIDERS
    from deployfa.runtimes.targets import is_engine, open_runner
    from deployfa.tables import open_fleet

    if request.target in PROVIDERS:
        import onnxruntime  # noqa: F401  (its loading is timed apart from the session)

    def make() -> tuple[Runner, tuple[TensorSpec, ...]]:
        if is_engine(request.target):
            return _load_engine(request)
        runner = open_runner(
            request.target,
            Path(request.graph or ""),
            threads=request.threads,
            spinning=request.spinning,
            bound=open_fleet(request.fleet).arrays if request.fleet else None,
        )
        return runner, runner.inputs

    return make


def _load_engine(request: say.Open) -> tuple[Runner, tuple[TensorSpec, ...]]:
    from deployfa.bundle import Bundle
    from deployfa.bundle.open_engine import open_engine

    if request.bundle is None:
        raise RuntimeTargetError(f"{request.label} is a graph, and {request.target} runs engines; leave --against out")
    # what is read is checked as it is read
    runner = open_engine(Bundle.open(request.bundle, check_files=False), request.target, name=request.engine)
    return runner, runner.inputs


def _load_module(request: say.Open) -> Callable[[], tuple[Runner, tuple[TensorSpec, ...]]]:
    import torch

    from deployfa.runtimes.torch import TorchRunner
    from deployfa.training.reference import adapted_model

    torch.set_num_threads(request.threads)

    def make() -> tuple[Runner, tuple[TensorSpec, ...]]:
        module = adapted_model(Path(request.adapter or ""), request.model)
        runner = TorchRunner(module, module_inputs(module, [spec.name for spec in request.inputs]), ())
        return runner, runner.inputs

    return make


def module_inputs(module: Any, beside: list[str]) -> list[str]:
    """Which inputs of the graph beside it the module takes: those its ``forward`` names, else all, in order."""
    import inspect

    parameters = inspect.signature(module.forward).parameters
    named = [name for name in beside if name in parameters]
    if named:
        return named
    return beside or [name for name in _TOKEN_INPUTS if name in parameters] or list(parameters)[:1]


def settle(limit_s: float = 1.0) -> None:
    """Wait until this process's own threads have stopped polling, so that they take nothing from the next one."""
    deadline = time.perf_counter() + limit_s
    quiet = 0
    while quiet < 2 and time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.003)
        quiet = quiet + 1 if time.process_time() - before < 0.0005 else 0


def _take_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Keep the real stdin and stdout to ourselves: a library that prints would corrupt the protocol."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _die_with(parent: int) -> None:
    """Linux: ask to be killed when the parent dies, however it dies; it may have died already."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the bench that started this worker is gone")


if __name__ == "__main__":
    sys.exit(main())
