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


@pytest.mark.parametrize(("load", "busy"), [(None, False), (2.0, False), (2.01, True)])
def test_busy_is_more_than_half_a_core_each(load, busy):
    assert msgspec.structs.replace(describe_machine(), cores=4, load_1min=load).busy is busy


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity to set")
def test_cores_are_those_this_process_may_use():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
