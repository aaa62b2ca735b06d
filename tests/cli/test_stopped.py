"""A command that is told to stop leaves nothing half-made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("deployfa-")}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can answer")
@pytest.mark.parametrize(("how", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_stopped_in_the_middle(how: str, status: int, trained: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL cannot be answered: what is left then shows that there was something to remove."""
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "deployfa.cli", "export", "--adapter", trained["vefa"], "--out", out],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + 120
    while not left(scratch):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.Signals[how])
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert bool(left(scratch)) == (how == "SIGKILL")
    assert not out.exists()
