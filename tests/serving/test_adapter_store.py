"""The folder of adapters: names that cannot leave it, files that appear whole, one server at a time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployfa.errors import InputError, StorageError
from deployfa.serving.adapter_store import AdapterStore, check_stored_name


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path / "deep" / "state")
    yield store
    store.close()


def again(store: AdapterStore) -> AdapterStore:
    store.close()
    return AdapterStore(store.folder)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def read(store: AdapterStore, name: str) -> bytes:
    file = store.file(name)
    assert file is not None
    return file.read_bytes()


NAMES = [
    "shop",
    "a/b",
    "../../etc/passwd",
    "..",
    ".",
    "/",
    "~",
    ".lock",
    ".incoming",
    "x.pt",
    "x.removed",
    "x%2fy",
    "ä b",
]


def test_no_name_leaves_the_folder(store: AdapterStore, tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        store.put(name, b"%d" % number, ".safetensors")
    assert {path.parent for path in map(store.file, NAMES) if path} == {store.folder}
    assert sorted(store.names()) == sorted(NAMES)
    outside = [path for path in tmp_path.rglob("*") if store.folder not in (path, *path.parents)]
    assert outside == [tmp_path / "deep"]
    opened = again(store)
    assert sorted(opened.names()) == sorted(NAMES) and opened.odd() == []
    assert [read(opened, name) for name in NAMES] == [b"%d" % number for number in range(len(NAMES))]
    for name in NAMES:
        opened.remove(name, mark=True)
    assert listing(opened.folder) == sorted([*(f"{path}" for path in _marks(NAMES)), ".incoming"])
    opened = again(opened)
    assert opened.removed() == set(NAMES) and opened.names() == []
    opened.close()


def _marks(names: list[str]) -> list[str]:
    from urllib.parse import quote

    return [f"{quote(name, safe='')}.removed" for name in names]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "cannot name an adapter"),
        ("a\0b", "cannot name an adapter"),
        ("a\nb", "cannot name an adapter"),
        ("\ud800", "cannot name an adapter"),
        ("base", "row 0"),
        ("x" * 129, "129 bytes"),
        ("ä" * 65, "130 bytes"),
        ("/" * 67, "201 percent-encoded"),
    ],
)
def test_names_that_cannot_be(store: AdapterStore, name: str, why: str) -> None:
    for refuse in (
        lambda: check_stored_name(name),
        lambda: store.put(name, b"", ".pt"),
        lambda: store.remove(name),
    ):
        with pytest.raises(InputError, match=why):
            refuse()
    assert listing(store.folder) == [".incoming"]


def test_the_longest_names_are_kept(store: AdapterStore) -> None:
    for name in ("x" * 128, "/" * 66, "ä" * 33):
        store.put(name, b"1", ".onnx_adapter")
        assert read(store, name) == b"1"


def test_a_suffix_and_a_file_that_cannot_be(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"kept as '.exe'; pass one of .safetensors"):
        store.put("a", b"", ".exe")
    with pytest.raises(InputError, match="cannot read"):
        store.put("a", tmp_path / "none", ".pt")
    assert listing(store.folder) == [".incoming"]


def test_one_file_a_name_whatever_its_suffix(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / "given").write_bytes(b"two")
    store.put("a", b"one", ".safetensors")
    store.put("a", tmp_path / "given", ".pt")
    assert read(store, "a") == b"two" and (tmp_path / "given").is_file()
    assert listing(store.folder) == [".incoming", "a.pt"]
    store.remove("a")
    store.remove("a")
    assert store.file("a") is None and listing(store.folder) == [".incoming"]


def test_a_mark_goes_when_the_name_comes_back(store: AdapterStore) -> None:
    store.put("own", b"1", ".pt")
    store.remove("own", mark=True)
    assert store.removed() == {"own"} and listing(store.folder) == [".incoming", "own.removed"]
    store.put("own", b"2", ".pt")
    assert store.removed() == set() and listing(store.folder) == [".incoming", "own.pt"]


def test_what_is_not_committed_is_gone(store: AdapterStore) -> None:
    store.put("a", b"old", ".pt")
    with pytest.raises(KeyError), store.incoming("a", b"new", ".pt") as incoming:
        assert incoming.file.read_bytes() == b"new" and incoming.file.suffix == ".pt"
        assert read(store, "a") == b"old"
        raise KeyError
    assert read(store, "a") == b"old" and listing(store.folder) == [".incoming", "a.pt"]


def test_the_leftovers_of_a_kill_are_swept(store: AdapterStore) -> None:
    """Half a file, two files of one name, a mark beside a file."""
    store.put("a", b"old", ".safetensors")
    store.close()
    (store.folder / ".incoming" / "b.pt").write_bytes(b"half")
    (store.folder / "a.pt").write_bytes(b"new")
    os.utime(store.folder / "a.safetensors", (1, 1))
    (store.folder / "a.removed").touch()
    opened = AdapterStore(store.folder)
    assert opened.names() == ["a"] and read(opened, "a") == b"new" and not opened.removed()
    assert listing(store.folder) == [".incoming", "a.pt"]
    opened.close()


def test_strangers_are_left_alone_and_named(store: AdapterStore) -> None:
    store.close()
    for name in ("notes.txt", "a b.pt", "%61.pt", "base.pt", "nothing", ".pt"):
        (store.folder / name).write_bytes(b"?")
    (store.folder / "folder.pt").mkdir()
    (store.folder / "link.pt").symlink_to(store.folder / "notes.txt")
    opened = AdapterStore(store.folder)
    assert opened.names() == []
    names = [name for name, _ in opened.odd()]
    assert names == sorted(["notes.txt", "a b.pt", "%61.pt", "base.pt", "nothing", ".pt", "folder.pt", "link.pt"])
    assert all((store.folder / name).exists() for name in names)
    assert dict(opened.odd())["a b.pt"] == "its adapter would be kept as 'a%20b.pt'; load it by its name"
    opened.close()


def test_newest_first(store: AdapterStore) -> None:
    for number, name in enumerate("cab"):
        store.put(name, b"", ".pt")
        os.utime(store.folder / f"{name}.pt", (number, number))
    assert store.names() == ["b", "a", "c"]


def test_two_servers_do_not_share_a_folder(store: AdapterStore) -> None:
    with pytest.raises(InputError, match=r"is used by another server; pass another --state"):
        AdapterStore(store.folder)
    code = "import pathlib, sys, deployfa.serving.adapter_store as a; a.AdapterStore(pathlib.Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, str(store.folder)], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "is used by another server" in other.stderr
    store.put("a", b"1", ".pt")
    again(store).close()


def test_a_full_disk_changes_nothing(store: AdapterStore) -> None:
    """The limit on a file's size is refused at the same place."""
    store.put("a", b"old", ".pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*; free some space or pass another --state"):
            store.put("a", bytes(200_000), ".pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(store, "a") == b"old" and listing(store.folder) == [".incoming", "a.pt"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="pass another --state"):
        AdapterStore(tmp_path / "file" / "state")
