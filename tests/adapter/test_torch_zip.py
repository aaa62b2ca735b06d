"""Files from strangers are data: what a hostile ``.pt`` can try, and that nothing of it ever runs.

Every pickle here is first shown to do its harm under Python's own unpickler where it can, so that a refusal is not for
the wrong reason.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployfa.adapter import Adapter, torch_zip
from deployfa.adapter.adapter import FORMAT
from deployfa.adapter.torch_zip import read_torch_zip
from deployfa.errors import AdapterFormatError

MANY = settings(max_examples=200, suppress_health_check=list(HealthCheck))


class Call:
    """Pickles to a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class State(dict):
    """Pickles to ``{}`` that is then given ``state``."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return collections.OrderedDict, (), self.state


def whole(value):
    return {"format": FORMAT, "meta": {"method": "vefa"}, "tensors": {"edit/fc/lambda": value}}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [whole, lambda v: v, lambda v: [{"a": (v,)}], lambda v: whole([v])])
@pytest.mark.parametrize(
    "payload",
    [
        lambda marker: Call(os.system, f"touch {marker}"),
        lambda marker: Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
        lambda marker: Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
        lambda marker: Call(io.open, str(marker), "w"),
        lambda marker: Call(os.mkdir, str(marker)),
        lambda marker: Call(torch._utils._rebuild_tensor_v2, Call(os.mkdir, str(marker)), 0, (), (), False, {}),
    ],
)
def test_code_is_never_run(tmp_path, write_pt, payload, wrap, protocol):
    marker = tmp_path / "ran"
    pickled = pickle.dumps(wrap(payload(marker)), protocol=protocol)
    path = write_pt(pickled)
    with pytest.raises(AdapterFormatError, match=r"asks to run '\w+\.\w+', and adapters are data"):
        Adapter.load(path)
    assert not marker.exists()


def test_the_payload_does_run_under_pickle(tmp_path):
    pickle.loads(pickle.dumps(whole(Call(os.mkdir, str(tmp_path / "ran")))))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nS'true'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02cnumpy\nload\n(S'x'\ntR.",
        b"\x80\x02ctorch\nload\n(S'x'\ntR.",
        b"\x80\x02ctorch._utils\n_import_dotted_name\n(S'os'\ntR.",
        b"\x80\x02ccollections\nOrderedDict.__init__\n)R.",
        b"\x80\x04\x8c\x0bcollections\x8c\x17OrderedDict.fromkeys.x\x93.",
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02c__main__\n__dict__\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_names_that_are_not_tensors_are_refused(write_pt, pickled):
    with pytest.raises(AdapterFormatError):
        read_torch_zip(write_pt(pickled))


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
@pytest.mark.parametrize(
    "state", [{"polluted": 1}, (None, {"__defaults__": (1,)}), (None, {"__kwdefaults__": {}}), ({}, {"_function": 1})]
)
def test_a_pickle_cannot_change_our_functions(write_pt, name, state):
    functions = torch_zip._rebuild_tensor, torch_zip._rebuild_parameter
    before = [(dict(vars(f)), f.__defaults__, f.__kwdefaults__) for f in functions]
    body = pickle.dumps(state, protocol=2)[2:-1]
    path = write_pt(b"\x80\x02ctorch._utils\n" + name.encode() + b"\n" + body + b"b.")
    with pytest.raises(AdapterFormatError):
        read_torch_zip(path)
    assert [(dict(vars(f)), f.__defaults__, f.__kwdefaults__) for f in functions] == before


def test_attributes_that_a_pickle_puts_on_a_dict_do_not_survive(write_pt):
    pickled = pickle.dumps(State({"get": "not a method", "items": 3, "values": 3}), protocol=2)
    assert read_torch_zip(write_pt(pickled)) == {} and type(read_torch_zip(write_pt(pickled))) is dict
    with pytest.raises(AdapterFormatError, match="not a deployfa adapter"):
        Adapter.load(write_pt(pickled))


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", 1j, bytearray(3), frozenset(), {1: 2}, {(1,): 2}, {None: 1}])
def test_values_that_are_not_plain(write_pt, value):
    with pytest.raises(AdapterFormatError):
        read_torch_zip(write_pt(pickle.dumps(value, protocol=4)))


def test_a_list_that_holds_itself(write_pt):
    loop: list = []
    loop.append(loop)
    with pytest.raises(AdapterFormatError):
        read_torch_zip(write_pt(pickle.dumps(loop)))


def test_lists_that_share_each_other_a_thousand_million_times(write_pt):
    laugh: list = []
    for _ in range(30):
        laugh = [laugh, laugh]
    with pytest.raises(AdapterFormatError, match="more than 1000000 values"):
        read_torch_zip(write_pt(pickle.dumps(laugh)))


def test_deep_nesting(write_pt):
    with pytest.raises(AdapterFormatError):
        read_torch_zip(write_pt(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))


def tensor_pickle(
    size=(2, 2), stride=(2, 1), offset=0, *, key="0", count=4, storage="FloatStorage", kind="storage", module="torch"
):
    """What torch.save writes for one tensor, with anything wrong in it that one likes."""

    class Writer(pickle._Pickler):
        def persistent_id(self, value):
            return value.pid if isinstance(value, Storage) else None

        def save(self, value, save_persistent_id=True):
            if isinstance(value, Name):
                self.write(b"c" + value.encode() + b"\n")
            else:
                super().save(value, save_persistent_id)

    class Name(str):
        pass

    class Storage:
        pid = (kind, Name(f"{module}\n{storage}"), key, "cpu", count)

    stream = io.BytesIO()
    writer = Writer(stream, protocol=2)
    arguments = (Storage(), offset, size, stride, False, collections.OrderedDict())
    stream.write(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n")
    writer.save(arguments[:5])
    stream.write(b"R.")
    return stream.getvalue()


FLOATS = np.arange(4, dtype="<f4").tobytes()


def test_the_hand_made_tensor_is_read(write_pt):
    array = read_torch_zip(write_pt(tensor_pickle(), {"0": FLOATS}))
    assert array.tolist() == [[0, 1], [2, 3]] and array.dtype == np.float32
    turned = read_torch_zip(write_pt(tensor_pickle(stride=(1, 2)), {"0": FLOATS}))
    assert turned.tolist() == [[0, 2], [1, 3]]
    assert read_torch_zip(write_pt(tensor_pickle((), (), 3), {"0": FLOATS})).tolist() == 3


@pytest.mark.parametrize(
    "lie",
    [
        {"count": 5},
        {"count": 3},
        {"count": 10**12},
        {"count": -4},
        {"count": "four"},
        {"count": None},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": "/etc/passwd"},
        {"key": "²"},
        {"key": 7},
        {"kind": "module"},
        {"storage": "ByteStorage"},
        {"storage": "DoubleStorage"},
        {"storage": "UntypedStorage", "module": "torch.storage"},
        {"module": "os"},
        {"size": (2, 3)},
        {"size": (5,), "stride": (1,)},
        {"size": (4,), "stride": (2,)},
        {"size": (2, 2), "offset": 1},
        {"offset": 4},
        {"offset": -1},
        {"offset": 2**70},
        {"offset": "0"},
        {"size": (-2, -2)},
        {"size": (-1, 2)},
        {"stride": (-2, 1)},
        {"stride": (-(2**62), 1)},
        {"stride": (2**62, 1)},
        {"stride": (2**63, 2**63)},
        {"size": (2, 2), "stride": (2,)},
        {"size": 4, "stride": 1},
        {"size": ("2", 2)},
        {"size": (2.5, 2)},
        {"size": (10**6, 10**6), "stride": (0, 0)},
        {"size": (5,), "stride": (0,)},
        {"size": (1,) * 70, "stride": (1,) * 70},
        {"size": (2**40, 0, 2**40), "stride": (1, 1, 1)},
        {"size": None, "stride": None},
    ],
    ids=str,
)
def test_tensors_that_lie(write_pt, lie):
    with pytest.raises(AdapterFormatError):
        read_torch_zip(write_pt(tensor_pickle(**lie), {"0": FLOATS}))


@pytest.mark.parametrize("pid", [b"N", b"K\x01", b"]", b"(tN\x86", b"X\x07\x00\x00\x00storage", b"(" + b"N" * 5 + b"t"])
def test_persistent_ids_that_are_no_storage(write_pt, pid):
    with pytest.raises(AdapterFormatError):
        read_torch_zip(write_pt(b"\x80\x02" + pid + b"Q.", {"0": FLOATS}))


def test_a_storage_alone_is_no_adapter(write_pt):
    start = tensor_pickle().index(b"X\x07\x00\x00\x00storage") - 1
    body = tensor_pickle()[start:]
    with pytest.raises(AdapterFormatError):
        read_torch_zip(write_pt(b"\x80\x02" + body[: body.index(b"Q") + 1] + b".", {"0": FLOATS}))


def test_compressed_members_are_refused(write_pt):
    bomb = write_pt(tensor_pickle(count=2**24), {"0": bytes(2**26)}, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**18
    with pytest.raises(AdapterFormatError, match="compressed members"):
        read_torch_zip(bomb)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("member", ["archive/data.pkl", "archive/data/0", "archive/byteorder"])
def test_two_members_of_one_name_are_refused(write_pt, member):
    with pytest.raises(AdapterFormatError, match="two members of one name"):
        read_torch_zip(write_pt(tensor_pickle(), {"0": FLOATS}, members={member: FLOATS}))


@pytest.mark.parametrize("members", [{"other/data.pkl": b"N."}, {"data.pkl": b"N."}])
def test_two_pickles_are_refused(write_pt, members):
    with pytest.raises(AdapterFormatError, match="not a torch file"):
        read_torch_zip(write_pt(tensor_pickle(), {"0": FLOATS}, members=members))


def test_big_endian_and_oversized_structures(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/byteorder", b"big")
    with pytest.raises(AdapterFormatError, match="big-endian"):
        read_torch_zip(path)
    monkeypatch.setattr(torch_zip, "_MAX_PICKLE_BYTES", 10)
    torch.save({"a": 1}, path)
    with pytest.raises(AdapterFormatError, match="structure of over"):
        read_torch_zip(path)


def test_sizes_that_the_zip_directory_lies_about(tmp_path, write_pt):
    path = write_pt(tensor_pickle(), {"0": FLOATS})
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")
    for size in (0, 1, 2**31, 2**32 - 1):
        lying = bytearray(content)
        lying[at + 20 : at + 28] = struct.pack("<II", size, size)
        path.write_bytes(lying)
        with pytest.raises(AdapterFormatError):
            read_torch_zip(path)


@pytest.mark.parametrize("flag", [1, 0x20, 0x40])
def test_encrypted_and_patched_members(write_pt, flag):
    path = write_pt(tensor_pickle(), {"0": FLOATS})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.index(signature)
        content[at + offset] |= flag
    path.write_bytes(content)
    with pytest.raises(AdapterFormatError):
        read_torch_zip(path)


@given(st.binary(max_size=60))
@MANY
def test_any_pickle_is_read_or_refused(write_pt, body):
    with contextlib.suppress(AdapterFormatError):
        read_torch_zip(write_pt(b"\x80\x02" + body + b".", {"0": FLOATS}))


@given(st.integers(0, 10**9), st.integers(0, 255))
@MANY
def test_any_changed_byte_of_the_zip_is_read_or_refused(write_pt, at, byte):
    path = write_pt(tensor_pickle(), {"0": FLOATS})
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content)
    with contextlib.suppress(AdapterFormatError):
        assert read_torch_zip(path).tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.randn(3, 4).t(), "b": [torch.randn(2), (torch.tensor(1.5), None, True, 3, "x", 2.5)]},
        collections.OrderedDict(a=torch.randn(4)[1:3], b=torch.nn.Parameter(torch.randn(2, 2))),
        {"half": torch.randn(3).half(), "bf16": torch.randn(3).bfloat16(), "double": torch.randn(3).double()},
        {"long": torch.arange(3), "int": torch.arange(3).int(), "bool": torch.tensor([True, False])},
        {"empty": torch.empty(0, 3), "one": torch.empty(1, 1, 1)},
        torch.randn(2, 3, 4).permute(2, 0, 1),
    ],
)
def test_same_as_torch_load_with_weights_only(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    equal(read_torch_zip(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True))


def equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert str(theirs.dtype) == f"torch.{ours.dtype.name}" and tuple(theirs.shape) == ours.shape
        theirs = theirs.detach().contiguous().reshape(-1)
        assert theirs.view(torch.uint8).numpy().tobytes() == ours.tobytes()
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            equal(mine, other)
    else:
        assert ours == theirs and type(ours) is type(theirs)
