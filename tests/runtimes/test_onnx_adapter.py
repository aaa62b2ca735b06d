"""``.onnx_adapter``: what goes in comes out, the same bytes each time, and whatever is wrong with a file is seen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from deployfa.errors import AdapterFormatError, BaseMismatchError, EditError, InputError, OutputExistsError
from deployfa.runtimes.onnx_adapter import model_version, read_labelled, read_onnx_adapter, write_onnx_adapter
from deployfa.tables.layout import ACTIVE, LABELS

from .slot_graph import SlotGraph


@pytest.fixture
def file(slot_graph: SlotGraph, tmp_path: Path) -> Path:
    path = tmp_path / "a.onnx_adapter"
    write_onnx_adapter(path, slot_graph.row(1), slot_graph.layout, idle_branch=slot_graph.idle_branch)
    return path


def read(slots: SlotGraph, path: Path):
    return read_onnx_adapter(path, slots.layout, idle_branch=slots.idle_branch)


def rewritten(path: Path, change, *, model_version=None, adapter_version=None) -> None:
    """The file with other tensors, by ONNX Runtime alone."""
    before = ort.AdapterFormat.read_adapter(str(path))
    tensors = change({name: np.array(value.numpy()) for name, value in before.get_parameters().items()})
    after = ort.AdapterFormat()
    after.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    after.set_model_version(before.get_model_version() if model_version is None else model_version)
    after.set_adapter_version(before.get_adapter_version() if adapter_version is None else adapter_version)
    after.export_adapter(str(path))


def test_what_was_written_is_read(slot_graph, file):
    row = slot_graph.row(1)
    found = read(slot_graph, file)
    assert found.keys() == row.keys()
    assert all(np.array_equal(found[name], row[name]) and found[name].dtype == np.float32 for name in row)
    # labels that the adapter has not stay masked
    assert np.isneginf(found["adapter/head/bias"]).sum() == 2


def test_names_of_labels_are_part_of_what_the_checksum_is_of(slot_graph, tmp_path):
    path, labels = tmp_path / "a.onnx_adapter", ("no", "yes", "☃")
    own = {"idle_branch": slot_graph.idle_branch}
    write_onnx_adapter(path, slot_graph.row(1), slot_graph.layout, **own, labels=labels)
    assert read_labelled(path, slot_graph.layout, **own)[1] == labels
    rewritten(path, lambda tensors: {**tensors, LABELS: tensors[LABELS][::-1].copy()})
    with pytest.raises(AdapterFormatError, match="its numbers are not those that were written"):
        read_labelled(path, slot_graph.layout, **own)


def test_the_file_is_onnx_runtimes_own(slot_graph, file):
    plain = ort.AdapterFormat.read_adapter(str(file))
    names = set(plain.get_parameters())
    assert names == {*slot_graph.layout.shapes(), *([ACTIVE] if slot_graph.idle_branch else [])}
    assert plain.get_model_version() == model_version(slot_graph.layout)


def test_the_same_row_gives_the_same_bytes(slot_graph, file, tmp_path):
    row = slot_graph.row(1)
    again = tmp_path / "again.onnx_adapter"
    backwards = dict(reversed(row.items()))
    write_onnx_adapter(again, backwards, slot_graph.layout, idle_branch=slot_graph.idle_branch)
    assert again.read_bytes() == file.read_bytes()
    row["adapter/lambda"][3] += 1
    write_onnx_adapter(again, row, slot_graph.layout, idle_branch=slot_graph.idle_branch, force=True)
    assert again.read_bytes() != file.read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path):
    """Nothing of hash seeds or memory is in the file."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from runtimes.slot_graph import SlotGraph\n"
        "from deployfa.runtimes.onnx_adapter import write_onnx_adapter\n"
        "home = Path(sys.argv[2]); home.mkdir(); slots = SlotGraph(home)\n"
        "write_onnx_adapter(home / 'a.onnx_adapter', slots.row(1), slots.layout, idle_branch=True)"
    )
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(tmp_path / seed)]
        result = subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        found.append((tmp_path / seed / "a.onnx_adapter").read_bytes())
    assert found[0] == found[1]


def test_every_cut_and_every_changed_byte_is_seen(slot_graph, file):
    """A cut file is none; a changed one is refused, or says what it said (a byte that nothing reads)."""
    whole = file.read_bytes()
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterFormatError, match="convert the adapter again"):
            read(slot_graph, file)
    row = slot_graph.row(1)
    refused = 0
    positions = range(0, len(whole), 3)
    for position in positions:
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        try:
            found = read(slot_graph, file)
        except InputError:
            refused += 1
        else:
            assert all(np.array_equal(found[name], row[name]) for name in row)
    assert refused > 0.8 * len(positions)


@pytest.mark.parametrize("content", [b"", b"not an adapter", b"\0" * 4096])
def test_what_is_no_adapter_file_is_refused(slot_graph, tmp_path, content):
    path = tmp_path / "x.onnx_adapter"
    path.write_bytes(content)
    with pytest.raises(AdapterFormatError, match=r"is not an \.onnx_adapter file, or a damaged one"):
        read(slot_graph, path)


def test_a_missing_file_is_named(slot_graph, tmp_path):
    with pytest.raises(InputError, match=r"no file '.*gone\.onnx_adapter'; make one with: deployfa convert"):
        read(slot_graph, tmp_path / "gone.onnx_adapter")


def test_a_file_for_another_base_or_layout_is_refused(slot_graph, file):
    for changes in ({"fingerprints": ["sha256:other"]}, {"vectors": slot_graph.layout.vectors[::-1]}):
        layout = msgspec.structs.replace(slot_graph.layout, **changes)
        with pytest.raises(BaseMismatchError, match="was made for another bundle"):
            read_onnx_adapter(file, layout, idle_branch=slot_graph.idle_branch)


def test_the_switch_must_be_the_bundles(slot_graph, file):
    with pytest.raises(AdapterFormatError, match="does not switch itself on"):
        read_onnx_adapter(file, slot_graph.layout, idle_branch=not slot_graph.idle_branch)


def _matching(slots: SlotGraph, tensors) -> int:
    from deployfa.runtimes import onnx_adapter

    return onnx_adapter._content(tensors)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda t: {n: a for n, a in t.items() if n != "adapter/lambda"}, "a row lacks 'adapter/lambda'"),
        (lambda t: {**t, "adapter/more": np.ones(2, np.float32)}, "a row has 'adapter/more'"),
        (lambda t: {**t, "adapter/lambda": np.full(6, np.nan, np.float32)}, "NaN or infinity"),
        (lambda t: {**t, "adapter/lambda": np.ones(7, np.float32)}, "'adapter/lambda' is float32"),
        (lambda t: {**t, "adapter/lambda": np.ones(6, np.int32)}, "'adapter/lambda' is int32"),
        (lambda t: {**t, LABELS: np.frombuffer(b"[1]", np.uint8).copy()}, "names of labels are no list of texts"),
        (lambda t: {**t, LABELS: np.ones(3, np.float32)}, "names of labels are no list of texts"),
        (lambda t: {n: np.zeros(1, np.float32) if n == ACTIVE else a for n, a in t.items()}, "switch itself on"),
    ],
)
def test_a_file_whose_checksum_is_right_and_whose_tensors_are_not(slot_graph, file, fault, message):
    """Made on purpose: each is refused for what it is."""
    if message == "switch itself on" and not slot_graph.idle_branch:
        pytest.skip("there is no switch in a graph without the branch")
    seen = {}

    def change(tensors):
        seen.update(fault(tensors))
        return seen

    rewritten(file, change)
    rewritten(file, lambda _: seen, adapter_version=_matching(slot_graph, seen))
    with pytest.raises(AdapterFormatError, match=message):
        read(slot_graph, file)


def test_two_sites_swapped_are_another_content(slot_graph, file):
    def change(tensors):
        lam = tensors["adapter/lambda"]
        return {**tensors, "adapter/lambda": lam[::-1].copy()}

    rewritten(file, change)
    with pytest.raises(AdapterFormatError, match="its numbers are not those that were written"):
        read(slot_graph, file)


def test_nothing_is_written_over_without_force_or_half(slot_graph, file):
    before = file.read_bytes()
    with pytest.raises(OutputExistsError):
        write_onnx_adapter(file, slot_graph.row(2), slot_graph.layout, idle_branch=slot_graph.idle_branch)
    row = slot_graph.row(2)
    del row["adapter/delta"]
    with pytest.raises(EditError, match="lacks 'adapter/delta'"):
        write_onnx_adapter(file, row, slot_graph.layout, idle_branch=slot_graph.idle_branch, force=True)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
