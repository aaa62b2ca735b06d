"""Workers: what they answer, how they die, and that none is left behind.  Real processes, real graphs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import deployfa
from deployfa.bench import protocol as say
from deployfa.bench.worker import peak_memory_bytes
from deployfa.bench.worker_process import WorkerProcess
from deployfa.errors import RuntimeTargetError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(deployfa.__file__).parent.parent)}


def open_graph(path: Path) -> say.Open:
    return say.Open(
        label="a",
        kind="onnx",
        graph=str(path),
        adapter=None,
        model=None,
        target="onnxruntime-cpu",
        threads=1,
        spinning=False,
    )


@pytest.fixture
def worker():
    with WorkerProcess("a", threads=1, spinning=False) as process:
        yield process


def gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_whole_conversation(worker, make_graph):
    opened = worker.ask(open_graph(make_graph()), say.Opened)
    assert [spec.name for spec in opened.inputs] == ["input_ids"]
    assert opened.session_ms > 0 and opened.import_ms > 0 and worker.start_ms > 0
    assert worker.ask(say.Prepare(2, 3, 0, 1000), say.Prepared).first_ms > 0
    warmed = worker.ask(say.Warm(2000), say.Warmed)
    assert warmed.runs >= 10 and warmed.median_ms > 0
    block = worker.ask(say.Run(7), say.Block)
    assert len(block.ms) == 7 and min(block.ms) > 0
    assert worker.ask(say.Count(), say.Counted).flops == 2 * 6 * 64 * 64


def test_a_failing_request_names_the_contender_and_the_worker_lives_on(worker, make_graph, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a graph")
    with pytest.raises(RuntimeTargetError, match=r"contender 'a': onnxruntime does not load '.*broken\.onnx'"):
        worker.ask(open_graph(broken), say.Opened)
    with pytest.raises(RuntimeTargetError, match="contender 'a': the worker was asked to run before"):
        worker.ask(say.Run(1), say.Block)
    worker.ask(open_graph(make_graph()), say.Opened)
    with pytest.raises(RuntimeTargetError, match="contender 'a': onnxruntime failed while running"):
        worker.ask(say.Prepare(1, 50, 0, 10_000), say.Prepared)  # token ids beyond the embedding


def test_a_killed_worker_says_how_and_when(worker):
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeTargetError, match="the worker of contender 'a' was killed by signal 9 during 'run'"):
        worker.ask(say.Run(1), say.Block)


def test_last_words_are_in_the_message(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "nonsense")  # Python itself refuses to start
    with pytest.raises(
        RuntimeTargetError, match=r"ended with status 1 during 'starting'; its last words: .*PYTHONHASHSEED"
    ):
        WorkerProcess("a", threads=1, spinning=False)


def test_a_worker_that_does_not_answer_is_ended(make_graph):
    with WorkerProcess("a", threads=1, spinning=False) as worker:
        worker._timeout_s = 0.5
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeTargetError, match=r"did not answer within 0.5 s during 'memory'"):
            worker.ask(say.Memory(), say.Memorised)


def test_leaving_ends_the_worker_whatever_happened():
    with pytest.raises(ZeroDivisionError), WorkerProcess("a", threads=1, spinning=False) as worker:
        raise ZeroDivisionError
    assert gone(worker.pid)
    worker.close()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_worker_dies_with_its_bench(ending):
    code = (
        "import time\nfrom deployfa.bench.worker_process import WorkerProcess\n"
        "with WorkerProcess('a', threads=1, spinning=False) as w:\n    print(w.pid, flush=True)\n    time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
    )
    try:
        pid = int(parent.stdout.readline())
        assert not gone(pid, 0.1)
        parent.send_signal(ending)
        assert gone(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_what_libraries_print_does_not_reach_the_protocol():
    code = (
        "import os\nfrom deployfa.bench.worker import _take_streams\n_, replies = _take_streams()\n"
        "print('from python', flush=True)\nos.system('echo from a child')\nos.write(1, b'from native code')\n"
        "replies.write(b'reply')\nreplies.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, check=True)
    assert done.stdout == b"reply"
    assert all(text in done.stderr for text in (b"from python", b"from a child", b"from native code"))


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_the_workers_own_not_what_its_parent_once_held():
    """getrusage's figure survives exec: it would be the parent's here."""
    held = np.ones(40_000_000)
    assert peak_memory_bytes() > held.nbytes
    del held
    with WorkerProcess("a", threads=1, spinning=False) as worker:
        peak = worker.ask(say.Memory(), say.Memorised).peak_bytes
    assert 10e6 < peak < 200e6
