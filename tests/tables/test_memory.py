"""Memory that grows without moving, and address space that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from deployfa.errors import InputError
from deployfa.tables.memory import RowMemory

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
SHAPES = {"a": (5,), "b": (2, 3), "c": (1,)}


def addresses(memory: RowMemory, rows: int) -> dict[str, int]:
    return {name: view.__array_interface__["data"][0] for name, view in memory.views(rows).items()}


def test_a_longer_view_is_the_same_memory() -> None:
    memory = RowMemory(SHAPES, 5000, 5000)
    short = memory.views(2)
    before = addresses(memory, 2)
    memory.write(1, {"a": np.arange(5), "b": np.ones((2, 3)), "c": np.array([7])})
    memory.write(4999, {"a": np.ones(5), "b": np.ones((2, 3)), "c": np.ones(1)})
    long = memory.views(5000)
    assert addresses(memory, 5000) == before
    assert {name: view.shape for name, view in long.items()} == {"a": (5000, 5), "b": (5000, 2, 3), "c": (5000, 1)}
    np.testing.assert_array_equal(short["a"][1], np.arange(5))
    for name in SHAPES:
        assert np.shares_memory(short[name], long[name])
        np.testing.assert_array_equal(short[name], long[name][:2])


def test_rows_and_tensors_do_not_overlap() -> None:
    """Every number of every row of every tensor gets a value of its own, and still has it in the end."""
    memory = RowMemory(SHAPES, 3000, 3000)
    rng = np.random.default_rng(0)
    wanted = {name: rng.standard_normal((3000, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    for row in range(3000):
        memory.write(row, {name: values[row] for name, values in wanted.items()})
    for name, view in memory.views(3000).items():
        np.testing.assert_array_equal(view, wanted[name])


def test_what_is_not_written_is_zero_and_aligned() -> None:
    memory = RowMemory(SHAPES, 999, 999)
    for name, view in memory.views(999).items():
        assert view.dtype == np.float32 and view.flags.c_contiguous and not view.any()
        assert view.__array_interface__["data"][0] % 64 == 0, name


def test_readers_cannot_write() -> None:
    memory = RowMemory(SHAPES, 10, 10)
    for view in [*memory.views(3).values(), *memory.row(0).values()]:
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 1


def test_a_view_outlives_the_memory() -> None:
    memory = RowMemory(SHAPES, 10, 10)
    memory.write(0, {"a": np.arange(5), "b": np.ones((2, 3)), "c": np.ones(1)})
    view = memory.views(1)["a"]
    del memory
    np.testing.assert_array_equal(view[0], np.arange(5))


def test_what_cannot_be_reserved_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"cannot reserve .* GB of address space for .* rows; pass a smaller max_adap"):
        RowMemory(SHAPES, 2**58, 2**58)


def test_less_is_reserved_rather_than_nothing() -> None:
    memory = RowMemory(SHAPES, 2**58, 16)
    assert 16 <= memory.rows < 2**58
    memory.write(memory.rows - 1, {"a": np.ones(5), "b": np.ones((2, 3)), "c": np.ones(1)})
    assert memory.views(memory.rows)["a"][-1].all()


def test_reserving_under_a_limit_of_address_space() -> None:
    """In another process, whose address space ends soon: 65,536 rows of 1 MB do not fit, some thousand do."""
    code = (
        "import resource\n"
        "from deployfa.tables.memory import RowMemory\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({6 << 30}, {6 << 30}))\n"
        "memory = RowMemory({'a': (1 << 18,)}, 65536, 1)\n"
        # getrusage would give the peak of the process that started this one, if that was higher
        "status = open('/proc/self/status').read()\n"
        "print(memory.rows, status.split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, peak_kb = map(int, done.stdout.split())
    # 6 GB less what python itself maps; a halving never loses more than half
    assert 1024 <= rows < 6144
    # nothing of it was committed
    assert peak_kb < 200_000


@pytest.mark.skipif(
    not OVERCOMMIT.is_file() or OVERCOMMIT.read_text().strip() == "2", reason="the system promises no more than it has"
)
def test_more_than_the_machine_has_is_reserved_at_once() -> None:
    """A terabyte: address space is no claim on memory."""
    memory = RowMemory({"a": (1 << 18,)}, 1 << 20, 1)
    assert memory.rows == 1 << 20 and memory.row_bytes == 1 << 20


def test_what_is_not_written_costs_nothing() -> None:
    before = psutil.Process().memory_info().rss
    memory = RowMemory({"a": (1 << 18,)}, 4096, 4096)
    memory.write(4095, {"a": np.ones(1 << 18)})
    assert memory.views(4096)["a"].nbytes == 4096 << 20
    # 1 MB of float32, 2 MB of float64 and two huge pages, where the kernel gives those
    assert 1 << 20 <= psutil.Process().memory_info().rss - before < 16 << 20
