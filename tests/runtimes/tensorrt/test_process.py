"""A builder beside this process: stopped at once, and whatever becomes of it, here it is one error."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from deployfa.atomic import write_file
from deployfa.errors import DeployfaError, InputError, RuntimeTargetError, StorageError
from deployfa.runtimes.tensorrt import BuildRequest, build_engine
from deployfa.runtimes.tensorrt.builder import build

from .small import after_a_layer, small_request


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    return small_request(tmp_path)


def builders(of: psutil.Process | None = None) -> list[psutil.Process]:
    """The builder's processes under this one."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        try:
            if "deployfa.runtimes.tensorrt.process" in process.cmdline():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def during(act: Callable[[psutil.Process], None]) -> threading.Thread:
    """``act`` on the builder as soon as there is one."""

    def wait() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for process in builders():
                act(process)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_it_builds_what_the_library_builds_here(request_: BuildRequest, tmp_path: Path) -> None:
    """And the library's own words on standard output do not disturb the answers."""
    built = build_engine(request_, tmp_path / "beside")
    assert (tmp_path / "beside").stat().st_size == built.bytes > 1000
    code = (
        "import sys, msgspec, pathlib; from deployfa.runtimes.tensorrt.builder import *;"
        "built = build(msgspec.json.decode(sys.argv[1], type=BuildRequest), pathlib.Path(sys.argv[2]));"
        "print(msgspec.json.encode(built).decode())"
    )
    command = [sys.executable, "-c", code, msgspec.json.encode(request_).decode(), str(tmp_path / "here")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    alone = msgspec.json.decode(done.stdout.strip().splitlines()[-1], type=type(built))
    assert msgspec.structs.replace(alone, seconds=built.seconds) == built
    assert build.__doc__ and not builders()


@pytest.mark.parametrize("ending", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_one_line(ending: signal.Signals, request_: BuildRequest, tmp_path: Path) -> None:
    thread = during(lambda process: process.send_signal(ending))
    with pytest.raises(RuntimeTargetError) as caught:
        build_engine(request_, tmp_path / "engine")
    thread.join()
    text = str(caught.value)
    assert text.startswith(f"tensorrt-rtx crashed while it built the engine ({ending.name}")
    assert text.endswith("try another --precision, or another version of the library")
    assert "\n" not in text
    assert not (tmp_path / "engine").exists() and not builders()


def test_an_error_that_nobody_foresaw_is_one_line_too(request_: BuildRequest, tmp_path: Path) -> None:
    request = msgspec.structs.replace(request_, workspace_bytes=-1)
    with pytest.raises(RuntimeTargetError, match=r"crashed while it built the engine \(exit status 1: ") as caught:
        build_engine(request, tmp_path / "engine")
    assert "\n" not in str(caught.value)


def test_ctrl_c_ends_it_at_once(request_: BuildRequest, tmp_path: Path) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(request_, tmp_path / "engine", interrupt)
    assert not builders() and not (tmp_path / "engine").exists()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_with_the_process_that_asked(ending: signal.Signals, request_: BuildRequest, tmp_path: Path) -> None:
    """However that one ends: nobody is left who would take the engine."""
    code = (
        "import sys, msgspec, pathlib; from deployfa.runtimes.tensorrt import BuildRequest, build_engine;"
        "build_engine(msgspec.json.decode(sys.argv[1], type=BuildRequest), pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, msgspec.json.encode(request_).decode(), str(tmp_path / "engine")]
    with subprocess.Popen(command) as asking:
        end = time.monotonic() + 30
        while not (found := builders(psutil.Process(asking.pid))) and time.monotonic() < end:
            time.sleep(0.001)
        (builder,) = found
        builder.suspend()  # so that it is not done before
        asking.send_signal(ending)
        asking.wait()
    builder.resume()
    builder.wait(timeout=30)
    assert not (tmp_path / "engine").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_full(request_: BuildRequest, tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        build_engine(request_, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC
    # as compile does it
    with pytest.raises(StorageError, match="no space left to write"), write_file(tmp_path / "engine") as partial:
        partial.symlink_to("/dev/full")
        build_engine(request_, partial)
    assert not any(path.name.startswith((".engine", "engine")) for path in tmp_path.iterdir())


def test_a_folder_that_is_not_there(request_: BuildRequest, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_engine(request_, tmp_path / "none" / "engine")


def test_errors_keep_their_kind(tmp_path: Path) -> None:
    """The command line, and callers, tell a wrong option from a graph that is not taken."""
    with pytest.raises(InputError, match="no sizes for dimension 'batch'; pass --profile batch=MIN,OPT,MAX"):
        build_engine(small_request(tmp_path, profile={}), tmp_path / "engine")
    with pytest.raises(RuntimeTargetError, match="does not take node 'the Det'"):
        build_engine(small_request(tmp_path, after_a_layer("Det")), tmp_path / "engine")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(DeployfaError, match=r"not installed; run: pip install 'deployfa\[tensorrt\]'"):
            build_engine(small_request(tmp_path, target="tensorrt"), tmp_path / "engine")
    assert os.listdir(tmp_path) and not (tmp_path / "engine").exists()
