"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deployfa.adapter import Adapter
from deployfa.atomic import check_output, write_directory, write_file
from deployfa.edits import Edit
from deployfa.errors import OutputExistsError, StorageError


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_file_appears_at_the_end_only(tmp_path):
    out = tmp_path / "deep" / "er" / "x.bin"
    with write_file(out) as partial:
        partial.write_bytes(b"new")
        assert not out.exists() and partial.parent == out.parent
    assert out.read_bytes() == b"new"
    assert listing(out.parent) == ["x.bin"]


def test_directory_appears_at_the_end_only(tmp_path):
    out = tmp_path / "bundle"
    with write_directory(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
    assert listing(tmp_path) == ["bundle", "bundle/a"]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), OSError(errno.EIO, "input/output error")])
@pytest.mark.parametrize("write", [write_file, write_directory])
def test_nothing_half_made_is_left(tmp_path, write, error):
    def fail():
        with write(tmp_path / "out") as partial:
            (partial if write is write_file else partial / "a").write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert listing(tmp_path) == []


@pytest.mark.parametrize("write", [write_file, write_directory])
def test_a_writer_that_wrote_nothing_is_not_a_success(tmp_path, write):
    if write is write_directory:
        with write(tmp_path / "out"):
            pass
        assert (tmp_path / "out").is_dir()
        return
    with pytest.raises(FileNotFoundError), write(tmp_path / "out"):
        pass
    assert listing(tmp_path) == []


@pytest.mark.parametrize("write", [write_file, write_directory])
@pytest.mark.parametrize("old_kind", ["file", "directory"])
def test_existing_output_needs_force_and_stays_until_the_new_one_is_whole(tmp_path, write, old_kind):
    out = tmp_path / "out"
    if old_kind == "file":
        out.write_text("old")
    else:
        out.mkdir()
        (out / "old").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(OutputExistsError, match="--force"):
        check_output(out, force=False)
    with pytest.raises(OutputExistsError, match="--force"), write(out) as partial:
        raise AssertionError("must not get here")
    with pytest.raises(ValueError, match="boom"), write(out, force=True) as partial:
        assert listing(tmp_path)[-len(before) :] == before  # the hidden partial sorts first
        raise ValueError("boom")
    assert listing(tmp_path) == before
    with write(out, force=True) as partial:
        (partial if write is write_file else partial / "new").write_text("new")
        assert out.exists()
    assert listing(tmp_path) == (["out"] if write is write_file else ["out", "out/new"])


def test_a_failed_rename_puts_the_old_directory_back(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(FileNotFoundError), write_directory(out, force=True) as partial:
        partial.rmdir()  # what os.replace then finds missing
    assert listing(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_signal_between_the_two_renames_puts_the_old_one_back(tmp_path, monkeypatch, linked):
    out = tmp_path / "out"
    if linked:
        out.symlink_to(tmp_path)
    else:
        out.mkdir()
        (out / "old").write_text("old")
    before = listing(tmp_path)
    renames = []

    def interrupted(source, target):
        rename(source, target)
        renames.append(target)
        if len(renames) == 1:
            raise KeyboardInterrupt

    rename = os.replace
    with pytest.raises(KeyboardInterrupt), write_directory(out, force=True) as partial:
        (partial / "new").write_text("new")
        monkeypatch.setattr(os, "replace", interrupted)
    assert len(renames) == 2
    assert listing(tmp_path) == before and out.is_symlink() == linked


def test_force_on_a_link_replaces_the_link_and_leaves_its_target(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("kept")
    (tmp_path / "out").symlink_to(target)
    with write_directory(tmp_path / "out", force=True) as partial:
        (partial / "new").write_text("new")
    assert (target / "precious").read_text() == "kept"
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out" / "new").is_file()


@pytest.mark.parametrize("name", ["out", "a[1]", "**"])
def test_partials_of_dead_processes_are_swept_others_stay(tmp_path, dead_pid, name):
    stale_file, stale_folder = tmp_path / f".{name}.partial-{dead_pid}", tmp_path / f".{name}.partial-{dead_pid}0"
    stale_file.write_text("half")
    if not Path(f"/proc/{dead_pid}0").exists():
        stale_folder.mkdir()
        (stale_folder / "x").write_text("half")
    living = tmp_path / f".{name}.partial-{os.getppid()}"
    foreign = tmp_path / f".other.partial-{dead_pid}"
    unrelated = tmp_path / f".{name}.partial-mine"
    for path in (living, foreign, unrelated):
        path.write_text("kept")
    with write_file(tmp_path / name) as partial:
        partial.write_text("whole")
    assert listing(tmp_path) == sorted([living.name, foreign.name, unrelated.name, name])


def test_own_leftover_is_overwritten(tmp_path):
    leftover = tmp_path / f".out.partial-{os.getpid()}"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with write_directory(tmp_path / "out") as partial:
        assert listing(partial) == []


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(StorageError, match=r"is not a folder.*; pass another --out"), write_file(out):
            raise AssertionError("must not get here")


def test_name_too_long(tmp_path):
    with pytest.raises(StorageError, match="may not write"), write_file(tmp_path / ("x" * 250)) as partial:
        partial.write_text("x")


def test_native_writers_that_report_a_full_disk_their_own_way(tmp_path):
    with pytest.raises(StorageError, match="no space left"), write_file(tmp_path / "x") as partial:
        partial.write_text("half")
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert listing(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.pt", "adapter"])
def test_full_disk(small_disk, name):
    adapter = Adapter("vefa", {"fc": Edit(lam=np.ones(400_000, np.float32))})
    (small_disk / "mine").write_text("kept")
    with pytest.raises(StorageError, match=r"no space left to write .*MB free\); free some space"):
        adapter.save(small_disk / name)
    assert listing(small_disk) == ["mine"]


def test_full_disk_keeps_what_force_would_have_replaced(small_disk):
    out = small_disk / "adapter.safetensors"
    small = Adapter("vefa", {"fc": Edit(lam=np.ones(4, np.float32))})
    small.save(out)
    before = out.read_bytes()
    with pytest.raises(StorageError):
        Adapter("vefa", {"fc": Edit(lam=np.ones(400_000, np.float32))}).save(out, force=True)
    assert out.read_bytes() == before and listing(small_disk) == [out.name]


@pytest.mark.parametrize("where", [".", "..", "../.."])
def test_force_never_replaces_the_folder_one_stands_in(tmp_path, monkeypatch, where):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    with pytest.raises(StorageError, match="holds the folder you are in"), write_directory(Path(where), force=True):
        raise AssertionError("must not get here")
    assert inner.is_dir()


def test_force_replaces_only_what_it_could_have_made(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("thesis", "file"):
        with pytest.raises(StorageError, match=r"not a folder with manifest\.json"):
            check_output(tmp_path / name, force=True, holding="manifest.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis" / "manifest.json").write_text("{}")
    for name in ("empty", "thesis", "new"):
        check_output(tmp_path / name, force=True, holding="manifest.json")


@pytest.mark.parametrize("write", [write_file, write_directory])
def test_an_output_that_another_process_made_meanwhile_is_kept(tmp_path, write):
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError), write(out) as partial:
        (partial if write is write_file else partial / "a").write_text("late")
        out.write_text("first")
    assert listing(tmp_path) == ["out"] and out.read_text() == "first"
