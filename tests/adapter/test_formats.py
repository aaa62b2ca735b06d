"""Round trips, bit for bit, and files that are no adapter."""

from __future__ import annotations

import json
import struct

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployfa.adapter import Adapter, BaseReference
from deployfa.adapter.adapter import FORMAT
from deployfa.edits import Edit, LowRank
from deployfa.errors import AdapterFormatError, InputError, OutputExistsError

SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors", "directory": ""}
MANY = settings(max_examples=150, suppress_health_check=list(HealthCheck))


def bits(adapter):
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in adapter.tensors().items()}


@pytest.mark.parametrize("form", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("method", ["vefa", "lorfa", "lora", "ia3"])
def test_round_trip_is_bit_exact(tmp_path, make_adapter, method, dtype, form):
    adapter = make_adapter(method, dtype)
    before = bits(adapter)
    path = adapter.save(tmp_path / f"adapter{SUFFIXES[form]}")
    back = Adapter.load(path)
    assert bits(back) == before == bits(adapter)
    assert back.meta == adapter.meta
    assert form.replace("directory", f"PEFT {method.upper()}") in back.found
    with pytest.raises(OutputExistsError, match="--force"):
        adapter.save(path)
    other = Adapter("vefa", {"fc1": Edit(lam=np.ones(4))}, config={"target_modules": ["fc1"]})
    other.save(path, force=True)
    assert bits(Adapter.load(path)) == bits(other)


@pytest.mark.parametrize("form", SUFFIXES)
def test_one_flipped_bit_does_not_read_as_the_same(tmp_path, make_adapter, form):
    adapter = make_adapter("vefa")
    path = adapter.save(tmp_path / f"adapter{SUFFIXES[form]}")
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    content = bytearray(file.read_bytes())
    at = content.find(adapter.edits["fc1"].lam.tobytes())
    assert at > 0
    content[at] ^= 1
    file.write_bytes(content)
    try:
        assert bits(Adapter.load(path)) != bits(adapter)
    except AdapterFormatError as error:
        assert form == "pt" and "CRC" in str(error)  # the zip has checksums


@pytest.mark.parametrize("form", SUFFIXES)
def test_saving_again_writes_the_same_bytes(tmp_path, make_adapter, form):
    written = []
    for name in "abcdefghijklmnop":  # safetensors alone orders its metadata by chance
        path = make_adapter("lorfa").save(tmp_path / f"{name}{SUFFIXES[form]}")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        written.append([file.read_bytes() for file in files])
    assert written == written[:1] * 16


@pytest.mark.parametrize("form", SUFFIXES)
def test_strided_readonly_and_big_endian_arrays_stay_as_they_were(tmp_path, form):
    # torch takes native byte order only
    lam = np.arange(8, dtype="=f4" if form == "pt" else ">f4")[::2]
    lam.flags.writeable = False
    a = np.arange(8, dtype=np.float32).reshape(4, 2).T
    before = lam.tobytes(), a.tobytes()
    adapter = Adapter("vefa", {"fc": Edit(lam=lam)}, {"head": {"weight": a}}, config={"modules_to_save": ["head"]})
    back = Adapter.load(adapter.save(tmp_path / f"x{SUFFIXES[form]}"))
    assert np.array_equal(back.edits["fc"].lam, lam) and np.array_equal(back.modules["head"]["weight"], a)
    assert (lam.tobytes(), a.tobytes()) == before and not lam.flags.writeable


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("s", [0.1, 1 / 3, 16.0, 5e-324])
def test_s_and_empty_tensors_survive(tmp_path, form, s):
    low = LowRank(np.zeros((0, 4), np.float32), np.zeros((4, 0), np.float32), s)
    adapter = Adapter("lorfa", {"a.b": Edit(input_low_rank=low)})
    back = Adapter.load(adapter.save(tmp_path / f"x.{form}"))
    assert back.edits["a.b"].input_low_rank.s == s and bits(back) == bits(adapter)


def test_pt_equals_what_torch_reads(tmp_path, make_adapter):
    for dtype in ("float16", "float32", "bfloat16"):
        path = make_adapter("lorfa", dtype).save(tmp_path / f"{dtype}.pt")
        theirs = torch.load(path, weights_only=True)
        ours = Adapter.load(path)
        assert theirs["meta"] == msgspec.to_builtins(ours.meta)
        assert sorted(theirs["tensors"]) == sorted(ours.tensors())
        for name, array in ours.tensors().items():
            tensor = theirs["tensors"][name]
            assert tuple(tensor.shape) == array.shape and str(tensor.dtype) == f"torch.{array.dtype.name}"
            assert tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_safetensors_equals_what_safetensors_reads(tmp_path, make_adapter):
    path = make_adapter("lora").save(tmp_path / "x.safetensors")
    theirs, ours = safetensors.numpy.load_file(path), Adapter.load(path).tensors()
    assert sorted(theirs) == sorted(ours)
    assert all(np.array_equal(theirs[name], ours[name]) for name in ours)


@given(st.data())
@MANY
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, make_adapter, form, data):
    whole = make_adapter("lorfa").save(tmp_path / f"whole.{form}", force=True).read_bytes()
    cut = tmp_path / f"cut.{form}"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(AdapterFormatError, match=r"; .*again"):
        Adapter.load(cut)


@given(st.data())
@MANY
@pytest.mark.parametrize("form", ["pt", "safetensors", "directory", "ia3 directory"])
def test_a_damaged_file_is_read_or_refused_but_never_crashes(tmp_path, make_adapter, form, data):
    method, form = ("ia3", "directory") if form == "ia3 directory" else ("lorfa", form)
    path = make_adapter(method).save(tmp_path / f"whole{SUFFIXES[form]}", force=True)
    file = path / data.draw(st.sampled_from(sorted(p.name for p in path.iterdir()))) if path.is_dir() else path
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        Adapter.load(path)
    except AdapterFormatError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("suffix", ["", ".pt", ".bin", ".safetensors", ".txt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage" * 99, b"\x80\x04.", b"\xff" * 9, bytes(64)])
def test_what_is_no_adapter(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(AdapterFormatError, match="; "):
        Adapter.load(path)


def test_no_such_path(tmp_path):
    with pytest.raises(InputError, match="no adapter at"):
        Adapter.load(tmp_path / "x.pt")


def test_other_files_of_the_same_formats(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "x.pt")
    safetensors.numpy.save_file({"weight": np.ones(2)}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        with pytest.raises(AdapterFormatError, match="not a deployfa adapter; for a PEFT checkpoint pass its"):
            Adapter.load(tmp_path / name)
    torch.save({"weight": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterFormatError, match="not a torch file"):
        Adapter.load(tmp_path / "old.pt")
    with pytest.raises(InputError, match=r"use \.pt, \.safetensors, or a directory"):
        Adapter("vefa", {}).save(tmp_path / "x.onnx")


GOOD_META = {"method": "vefa"}


@pytest.mark.parametrize(
    "content",
    [
        {"format": FORMAT},
        {"format": FORMAT, "tensors": {}},
        {"format": FORMAT, "tensors": {}, "meta": {}},
        {"format": FORMAT, "tensors": {}, "meta": {"method": 3}},
        {"format": FORMAT, "tensors": {}, "meta": {"method": "vefa", "labels": "abc"}},
        {"format": FORMAT, "tensors": [torch.ones(1)], "meta": GOOD_META},
        {"format": FORMAT, "tensors": {"edit/fc/lambda": 3}, "meta": GOOD_META},
        {"format": FORMAT, "tensors": {"edit/fc/lambda": [1.0]}, "meta": GOOD_META},
        {"format": FORMAT, "tensors": {3: torch.ones(1)}, "meta": GOOD_META},
        {"format": FORMAT, "tensors": {"mystery": torch.ones(1)}, "meta": GOOD_META},
        {"format": FORMAT, "tensors": {"edit/lambda": torch.ones(1)}, "meta": GOOD_META},
        {"format": FORMAT, "tensors": {"edit/fc/lambda": torch.tensor(1.0)}, "meta": GOOD_META},
        {"format": FORMAT, "tensors": {"edit/fc/A": torch.ones(2, 2)}, "meta": GOOD_META},
        {"format": "deployfa-adapter/9", "tensors": {}, "meta": GOOD_META},
        [torch.ones(1)],
        torch.ones(1),
        "text",
        None,
    ],
)
def test_torch_files_with_other_content(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(AdapterFormatError, match="; "):
        Adapter.load(tmp_path / "x.pt")


@pytest.mark.parametrize("meta", ["", "{", "[]", '{"method": 1}', "[" * 100_000, '{"method": "vefa", "config": []}'])
def test_safetensors_with_a_broken_header(tmp_path, meta):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"edit/fc/lambda": np.ones(2)}, path, {"format": FORMAT, "meta": meta})
    with pytest.raises(AdapterFormatError, match=r"header|metadata"):
        Adapter.load(path)


def safetensors_file(path, entries, data=bytes(16)):
    header = json.dumps({"__metadata__": {"format": FORMAT, "meta": '{"method": "vefa"}'}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 32]},
        {"dtype": "F32", "shape": [400], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]},
        {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]},
        {"dtype": "X", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
    ],
)
def test_safetensors_that_lie(tmp_path, entry):
    path = safetensors_file(tmp_path / "x.safetensors", {"edit/fc/lambda": entry})
    if entry == {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}:
        assert Adapter.load(path).edits["fc"].lam.tolist() == [0, 0, 0, 0]
        return
    with pytest.raises(AdapterFormatError, match="; "):
        Adapter.load(path)


def test_check_base(make_adapter):
    adapter = make_adapter("vefa")
    mine = adapter.base.fingerprint
    assert adapter.check_base(mine) is None
    with pytest.raises(Exception, match=r"trained on base abababababab \(some/base\), but this base is 000000000000;"):
        adapter.check_base("sha256:" + "0" * 64)
    warning = adapter.check_base("sha256:" + "0" * 64, allow_mismatch=True)
    assert "going on because of --allow-base-mismatch" in warning
    assert "could not be checked" in Adapter("vefa", {}, base=BaseReference(name="x")).check_base(mine)


def test_counts(make_adapter):
    adapter = make_adapter("lorfa")
    assert adapter.parameters == 2 * (8 + 8 + 4) and adapter.module_parameters == 10
