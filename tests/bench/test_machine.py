from __future__ import annotations

import os

import msgspec
import pytest

from deployfa.bench.machine import available_cores, describe_machine


def test_the_machine_is_described():
    machine = describe_machine()
    assert machine.cpu and machine.system
    assert machine.versions["numpy"] == __import__("numpy").__version__
    assert machine.load_1min == pytest.approx(os.getloadavg()[0], abs=1.0)


@pytest.mark.parametrize(("share", "busy"), [(None, False), (0.1, False), (0.11, True)])
def test_busy_is_more_than_a_tenth_of_the_processors(share, busy):
    assert msgspec.structs.replace(describe_machine(), busy_share=share).busy is busy


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the share of busy time is read from /proc/stat")
def test_a_program_that_computes_is_seen():
    """A process that spins on one core: at least half of one core's share in the half second that is watched."""
    import subprocess
    import sys

    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        share = describe_machine().busy_share
    finally:
        spinner.kill()
        spinner.wait()
    assert share is not None
    assert 0.5 / (os.cpu_count() or 1) < share <= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity to set")
def test_cores_are_those_this_process_may_use():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
