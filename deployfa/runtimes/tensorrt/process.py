"""Build in a process of its own.

A builder is native code that prints to standard error, can crash, and, told through its own progress monitor to stop,
left a process that crashed when it ended (TensorRT for RTX 1.7).  Beside this process it can be stopped at once by
ending it, and whatever it does, here it is one error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from deployfa import errors
from deployfa.errors import DeployfaError, RuntimeTargetError
from deployfa.runtimes.tensorrt.builder import BuildRequest, Built
from deployfa.runtimes.tensorrt.progress import Progress

__all__ = ["build_engine"]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line from the builder's process: one of these."""

    share: float | None = None
    built: Built | None = None
    error: str | None = None
    kind: str = "RuntimeTargetError"
    errno: int | None = None


def build_engine(request: BuildRequest, out: Path, progress: Progress | None = None) -> Built:
    """Build as ``request`` says and write the engine to ``out``.  progress: called with the share done, in [0, 1].

    Ctrl-C ends the build at once.  Raises what ``builder.build`` raises, ``OSError`` if the disk refuses, and
    ``RuntimeTargetError`` if the library crashed; ``out`` is whole only if this returns.
    """
    with tempfile.TemporaryFile() as words:
        worker = subprocess.Popen(
            [sys.executable, "-m", "deployfa.runtimes.tensorrt.process", str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            # Ctrl-C is for this process, which then ends that one
            start_new_session=True,
        )
        try:
            last = _follow(worker, request, progress)
            code = worker.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        if last is not None and last.built is not None:
            return last.built
        if last is not None and last.error is not None:
            if last.errno is not None:
                raise OSError(last.errno, last.error)
            raise _known_error(last.kind)(last.error)
        words.seek(0)
        said = words.read().decode(errors="replace").strip().splitlines()
    raise RuntimeTargetError(
        f"{request.target} crashed while it built the engine ({_ending(code)}{': ' + said[-1] if said else ''}); "
        "try another --precision, or another version of the library"
    )


def _follow(worker: subprocess.Popen[bytes], request: BuildRequest, progress: Progress | None) -> Message | None:
    assert worker.stdin is not None and worker.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it ended before it read; its exit status says why
        worker.stdin.write(msgspec.json.encode(request) + b"\n")
        worker.stdin.flush()
    last: Message | None = None
    for line in worker.stdout:
        try:
            message = msgspec.json.decode(line, type=Message)
        except msgspec.MsgspecError:
            continue  # the library's own words
        if message.share is None:
            last = message
        elif progress is not None:
            progress(message.share)
    return last


def _known_error(kind: str) -> Callable[[str], DeployfaError]:
    found = getattr(errors, kind, RuntimeTargetError)
    if found is errors.MissingExtraError:  # made from other words than its own text
        return DeployfaError
    return found


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(out: Path, answers: IO[bytes]) -> None:
    """What the process does: read a request, build, answer."""
    from deployfa.runtimes.tensorrt.builder import build

    def say(message: Message) -> None:
        answers.write(msgspec.json.encode(message) + b"\n")
        answers.flush()

    shown = -1.0

    def progress(share: float) -> None:
        nonlocal shown
        if share - shown >= 0.005 or share >= 1.0 > shown:
            shown = share
            say(Message(share=share))

    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=BuildRequest)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        say(Message(built=build(request, out, progress)))
    except OSError as error:
        say(Message(error=str(error.strerror), errno=error.errno))
    except DeployfaError as error:
        say(Message(error=str(error), kind=type(error).__name__))


def _end_with_parent() -> None:
    """The other end of standard input is open as long as the process that asked lives, however that one ends."""
    # not by sys.stdin, whose lock would be held when the interpreter ends
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    # the library may print to standard output: answers go out by a copy of it, everything else to standard error
    with os.fdopen(os.dup(1), "wb") as channel:
        os.dup2(2, 1)
        _work(Path(sys.argv[1]), channel)
        # a library that crashes while it is unloaded has built all the same
        os._exit(0)
