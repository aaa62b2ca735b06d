"""``SlotRunner``: A, B, A again is A; none is the base; threads never see each other's adapter."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from deployfa.errors import EditError, InputError, RuntimeTargetError
from deployfa.graph.idle import with_row
from deployfa.graph.row_ops import add_slots
from deployfa.graph.storage import save_graph
from deployfa.runtimes.onnx_adapter import write_onnx_adapter
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.slots import SlotRunner

from .slot_graph import SlotGraph, numbers


@pytest.fixture(scope="module")
def runner(slot_graph: SlotGraph) -> SlotRunner:
    return SlotRunner(slot_graph.path, slot_graph.layout, threads=1, spinning=False)


@pytest.fixture
def feeds():
    return {"x": numbers(50, 4, 6)}


def written(slots: SlotGraph, folder: Path, seed: int, **options) -> Path:
    path = folder / f"{seed}.onnx_adapter"
    write_onnx_adapter(path, slots.row(seed, **options), slots.layout, idle_branch=slots.idle_branch)
    return path


def answer(runner, feeds, *arguments, **options):
    return runner.run(feeds, *arguments, **options)["logits"]


def test_a_b_a_is_a_by_file_and_by_feeds(slot_graph, runner, feeds, tmp_path):
    idle = OnnxRuntimeRunner(slot_graph.base_path, threads=1).run(feeds)["logits"]
    rows = {seed: slot_graph.row(seed) for seed in (1, 20)}
    files = {seed: runner.load(written(slot_graph, tmp_path, seed)) for seed in rows}
    fed = {seed: runner.load(row) for seed, row in rows.items()}
    one, other = answer(runner, feeds, files[1]), answer(runner, feeds, files[20])
    assert not np.allclose(one, other)
    for adapter in (files[1], fed[1]):
        assert np.array_equal(answer(runner, feeds, adapter), one)
    assert np.array_equal(answer(runner, feeds, fed[20]), other)
    assert np.array_equal(answer(runner, feeds, files[1]), one)
    # without an adapter: the base graph, bit for bit, whatever ran before; plain slots multiply by 1 and add 0
    assert np.array_equal(answer(runner, feeds, None)[:, :3], idle)


def test_an_adapter_answers_as_its_slots_with_that_row_in_them(slot_graph, runner, feeds, tmp_path):
    row = slot_graph.row(1)
    alone = save_graph(with_row(add_slots(slot_graph.base, slot_graph.layout), row), tmp_path)
    expected = OnnxRuntimeRunner(alone, threads=1).run(feeds)["logits"]
    assert np.array_equal(answer(runner, feeds, runner.load(row)), expected)


def test_heads_of_other_sizes(slot_graph, runner, feeds):
    for labels in (1, 2, 5):
        found = answer(runner, feeds, runner.load(slot_graph.row(1, labels=labels)))
        assert found.shape == (4, 5)
        assert np.isfinite(found[:, :labels]).all() and np.isneginf(found[:, labels:]).all()
    assert answer(runner, feeds, None).shape == (4, 3 if slot_graph.idle_branch else 5)


def test_strength_is_of_one_call(slot_graph, runner, feeds, tmp_path):
    row = slot_graph.row(1)
    file, fed = runner.load(written(slot_graph, tmp_path, 1)), runner.load(row)
    whole = answer(runner, feeds, file)
    for strength in (0.0, 0.25, 1.0):
        assert np.array_equal(
            answer(runner, feeds, file, strength=strength), answer(runner, feeds, fed, strength=strength)
        )
    assert np.array_equal(answer(runner, feeds, file, strength=1.0), whole)
    # at 0 it is the base's features under the adapter's head
    bare = {name: array if "head" in name else np.zeros_like(array) for name, array in row.items()}
    assert np.array_equal(answer(runner, feeds, file, strength=0.0), answer(runner, feeds, runner.load(bare)))
    assert not np.allclose(answer(runner, feeds, file, strength=0.25), whole)
    assert np.array_equal(answer(runner, feeds, file), whole)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="not between 0, the base, and 1"):
            runner.run(feeds, file, strength=wrong)
    with pytest.raises(InputError, match="none is active"):
        runner.run(feeds, None, strength=0.5)


def test_swap_sets_what_a_call_without_a_name_uses(slot_graph, runner, feeds):
    adapter = runner.load(slot_graph.row(1), labels=("a", "b", "c"))
    idle = answer(runner, feeds)
    assert runner.current is None
    assert runner.swap(adapter) is None
    assert runner.current is adapter and adapter.labels == ("a", "b", "c")
    assert np.array_equal(answer(runner, feeds), answer(runner, feeds, adapter))
    assert np.array_equal(answer(runner, feeds, None), idle)
    assert runner.swap(None) is adapter
    assert np.array_equal(answer(runner, feeds), idle)


def test_a_loaded_adapter_is_a_copy_that_nobody_changes(slot_graph, runner, feeds):
    row = slot_graph.row(1)
    adapter = runner.load(row)
    before = answer(runner, feeds, adapter)
    for array in row.values():
        array[...] = 7
    assert np.array_equal(answer(runner, feeds, adapter), before)
    with pytest.raises(ValueError, match="read-only"):
        adapter.row["adapter/lambda"][0] = 1


def test_a_replaced_file_leaves_what_was_loaded(slot_graph, runner, feeds, tmp_path):
    """The runtime maps the file; ours are written aside and renamed."""
    path = written(slot_graph, tmp_path, 1)
    adapter = runner.load(path)
    before = answer(runner, feeds, adapter)
    write_onnx_adapter(path, slot_graph.row(2), slot_graph.layout, idle_branch=slot_graph.idle_branch, force=True)
    assert np.array_equal(answer(runner, feeds, adapter), before)
    assert not np.array_equal(answer(runner, feeds, runner.load(path)), before)


def test_threads_never_see_each_others_adapter(slot_graph, runner, tmp_path):
    """Eight threads, eight adapters and none, swapped at every call, files and arrays mixed, while one keeps swapping
    what a call without a name would use."""
    feeds = {"x": numbers(51, 3, 6)}
    loaded = [None]
    for seed in range(1, 9):
        source = written(slot_graph, tmp_path, seed) if seed % 2 else slot_graph.row(seed)
        loaded.append(runner.load(source))
    expected = [answer(runner, feeds, adapter) for adapter in loaded]
    assert len({each.tobytes() for each in expected}) == len(expected)
    stop, wrong = threading.Event(), []

    def swap() -> None:
        number = 0
        while not stop.is_set():
            runner.swap(loaded[number % len(loaded)])
            number += 1

    def work(worker: int) -> int:
        order = np.random.default_rng(worker).integers(0, len(loaded), 400)
        for number in order:
            found = answer(runner, feeds, loaded[number])
            if not np.array_equal(found, expected[number]):
                wrong.append((worker, int(number)))
            # whoever is current, it is one of them, whole
            if answer(runner, feeds).tobytes() not in {each.tobytes() for each in expected}:
                wrong.append((worker, -1))
        return len(order)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) == 3200
    finally:
        stop.set()
        swapper.join()
        runner.swap(None)
    assert wrong == []


def test_what_is_no_row_is_refused(slot_graph, runner):
    row = slot_graph.row(1)
    with pytest.raises(EditError, match="lacks 'adapter/delta'"):
        runner.load({name: array for name, array in row.items() if name != "adapter/delta"})
    with pytest.raises(EditError, match="NaN or infinity"):
        runner.load({**row, "adapter/lambda": np.full_like(row["adapter/lambda"], np.nan)})


def test_a_graph_without_slots_is_refused(slot_graph):
    with pytest.raises(RuntimeTargetError, match="has no slot 'adapter/delta'; export it with --slots"):
        SlotRunner(slot_graph.base_path, slot_graph.layout, threads=1)


def test_a_run_still_checks_its_feeds(slot_graph, runner):
    adapter = runner.load(slot_graph.row(1))
    with pytest.raises(RuntimeTargetError, match="input 'x' is missing"):
        runner.run({}, adapter)
    with pytest.raises(RuntimeTargetError, match="'y' is not an input"):
        runner.run({"x": numbers(1, 2, 6), "y": numbers(2, 1)}, adapter)


def test_the_switch_forgotten_is_seen(slot_graph, runner, feeds):
    """Were ``adapter_active`` dropped from an adapter, it would answer as the base: no check of bits misses that."""
    if not slot_graph.idle_branch:
        pytest.skip("there is no switch in a graph without the branch")
    plain = OnnxRuntimeRunner(slot_graph.path, threads=1)
    forgotten = plain.run({**feeds, **slot_graph.row(1)})["logits"]
    assert np.array_equal(forgotten, answer(runner, feeds, None))
    assert not np.allclose(forgotten, answer(runner, feeds, runner.load(slot_graph.row(1)))[:, :3])


def test_names_of_labels_ride_in_the_file(slot_graph, runner, feeds, tmp_path):
    """ONNX Runtime adds the file to the run as it is; no number depends on the names."""
    row, layout, labels = slot_graph.row(1), slot_graph.layout, ("schlecht", "mäßig", "gut")
    path = tmp_path / "named.onnx_adapter"
    write_onnx_adapter(path, row, layout, idle_branch=slot_graph.idle_branch, labels=labels)
    named, plain = runner.load(path), runner.load(written(slot_graph, tmp_path, 1))
    assert named.labels == labels and plain.labels == ()
    assert runner.load(path, labels=("x",)).labels == ("x",), "the caller knows better"
    assert np.array_equal(answer(runner, feeds, named), answer(runner, feeds, plain))
    options = ort.RunOptions()
    lora = ort.LoraAdapter()
    lora.Load(str(path))
    options.add_active_adapter(lora)
    session = ort.InferenceSession(str(slot_graph.path), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(["logits"], feeds, options)[0][:, :3], answer(runner, feeds, named)[:, :3])


def test_a_graph_that_takes_no_names_runs_the_file_all_the_same(slot_graph, runner, feeds, tmp_path):
    """The runtime refuses it, so its arrays are fed: the same bits."""
    (tmp_path / "graph").mkdir()
    older = SlotGraph(tmp_path / "graph", idle_branch=slot_graph.idle_branch, takes_labels=False)
    path = tmp_path / "named.onnx_adapter"
    write_onnx_adapter(path, slot_graph.row(1), older.layout, idle_branch=older.idle_branch, labels=("a", "b", "c"))
    options, lora = ort.RunOptions(), ort.LoraAdapter()
    lora.Load(str(path))
    options.add_active_adapter(lora)
    session = ort.InferenceSession(str(older.path), providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="Invalid input name: adapter_labels"):
        session.run(None, feeds, options)
    theirs = SlotRunner(older.path, older.layout, threads=1, spinning=False)
    loaded = theirs.load(path)
    assert loaded.labels == ("a", "b", "c")
    assert np.array_equal(answer(theirs, feeds, loaded), answer(runner, feeds, runner.load(slot_graph.row(1))))
