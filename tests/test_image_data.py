"""Labelled pictures from every form, and one clear line for everything that is none."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deployfa.data import label_ids, label_names
from deployfa.errors import DataError
from deployfa.image_data import read_pictures
from deployfa.task_rows import rows_of
from deployfa.tasks import task_of


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        read_pictures(path)
    assert "\n" not in str(caught.value)
    for part in (*parts, ";"):
        assert part in str(caught.value)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


class TestFolders:
    def test_read(self, tmp_path: Path) -> None:
        for name in ("dogs/b.JPG", "cats/deep/a.png", "cats/notes.txt", ".hidden/c.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        rows = read_pictures(tmp_path)
        assert [(row.item, row.label) for row in rows] == [
            (tmp_path / "cats/deep/a.png", "cats"),
            (tmp_path / "dogs/b.JPG", "dogs"),
        ]
        assert label_ids(rows, label_names(rows)) == [0, 1]

    def test_refused(self, tmp_path: Path) -> None:
        refused(tmp_path / "no", "does not exist")
        refused(tmp_path, "has no folders")
        (tmp_path / "cats").mkdir()
        refused(tmp_path, "cats", "holds no pictures")


class TestArrays:
    def test_read(self, tmp_path: Path, images: np.ndarray) -> None:
        for labels, names, expected in (
            (np.array([3, 1, 1, 3]), None, ["3", "1", "1", "3"]),
            (np.array(["a", "b", "b", " a"]), None, ["a", "b", "b", "a"]),
            (np.array([0, 1, 1, 0], np.uint8), np.array(["cat", "dog"]), ["cat", "dog", "dog", "cat"]),
        ):
            given = {"images": images, "labels": labels} | ({} if names is None else {"label_names": names})
            np.savez(tmp_path / "a.npz", **given)
            rows = read_pictures(tmp_path / "a.npz")
            assert [row.label for row in rows] == expected
            assert all(np.array_equal(row.item, image) for row, image in zip(rows, images, strict=True))
            assert "picture 2 of" in rows[1].text

    def test_colours_and_no_labels(self, tmp_path: Path, images: np.ndarray) -> None:
        np.savez(tmp_path / "a.npz", images=np.stack([images] * 3, -1))
        refused(tmp_path / "a.npz", "no array 'labels'", "images")
        (first, *_) = read_pictures(tmp_path / "a.npz", need_label=False)
        assert first.item.shape == (5, 6, 3)
        assert first.label is None

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"images": np.zeros((4, 5, 6), np.float32)}, "images of float32"),
            ({"images": np.zeros((4, 3, 5, 6), np.uint8)}, "shape"),
            ({"images": np.zeros((0, 5, 6), np.uint8), "labels": np.zeros(0, int)}, "no pictures"),
            ({"labels": np.zeros(3, int)}, "for 4 images"),
            ({"labels": np.zeros(4)}, "labels of float64"),
            ({"labels": np.array(["a", "", "b", "c"])}, "empty label for picture 2"),
            ({"label_names": np.array(["cat"])}, "label 1 and 1 label_names"),
            ({"label_names": np.array([1, 2])}, "no list of texts"),
            ({"labels": np.array(["a"] * 4), "label_names": np.array(["a"])}, "positions"),
            ({"images": np.array([None] * 4)}, "cannot read"),
        ],
    )
    def test_refused(self, change: dict, part: str, tmp_path: Path, images: np.ndarray) -> None:
        np.savez(tmp_path / "a.npz", **{"images": images, "labels": np.array([0, 1, 1, 0]), **change})
        refused(tmp_path / "a.npz", part, "a.npz")

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "owned",)

        np.savez(tmp_path / "a.npz", images=np.array([Evil()], dtype=object), labels=np.zeros(1, int))
        refused(tmp_path / "a.npz", "cannot read")
        assert not (tmp_path / "owned").exists()

    def test_damaged(self, tmp_path: Path, images: np.ndarray) -> None:
        np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.zeros(4, int))
        content = (tmp_path / "a.npz").read_bytes()
        refused(tmp_path / "no.npz", "does not exist")
        for start in (0, len(content) // 4):
            (tmp_path / "b.npz").write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
            refused(tmp_path / "b.npz", "cannot read")
        (tmp_path / "b.npz").write_bytes(content[: len(content) // 2])
        refused(tmp_path / "b.npz", "cannot read")


class TestIdx:
    @pytest.mark.parametrize(
        ("pixels", "labels"),
        [
            ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
            ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
            ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
            ("images-idx3-ubyte.gz", "labels-idx1-ubyte"),
        ],
    )
    def test_read(self, pixels: str, labels: str, tmp_path: Path, images: np.ndarray) -> None:
        write_idx(tmp_path / pixels, images)
        write_idx(tmp_path / labels, np.array([7, 0, 2, 7], np.uint8))
        rows = read_pictures(tmp_path / pixels)
        assert [row.label for row in rows] == ["7", "0", "2", "7"]
        assert all(np.array_equal(row.item, image) for row, image in zip(rows, images, strict=True))

    def test_refused(self, tmp_path: Path, images: np.ndarray) -> None:
        pixels, labels = tmp_path / "a-images-idx3-ubyte", tmp_path / "a-labels-idx1-ubyte"
        write_idx(pixels, images)
        refused(pixels, "a-labels-idx1-ubyte", "beside it")
        write_idx(labels, np.zeros(3, np.uint8))
        refused(pixels, "4 images", "3 labels")
        write_idx(labels, images)
        refused(pixels, "1 dimensions")
        write_idx(labels, np.zeros(4, np.uint8))
        whole = pixels.read_bytes()
        for broken in (whole[:-1], whole + b"\0", whole[:9], b""):
            pixels.write_bytes(broken)
            refused(pixels, "fetch it again")
        # a header that promises more than any memory
        pixels.write_bytes(whole[:4] + b"\xff" * 12 + whole[16:])
        refused(pixels, "fetch it again")
        packed = tmp_path / "b-images-idx3-ubyte.gz"
        packed.write_bytes(b"no gzip")
        write_idx(tmp_path / "b-labels-idx1-ubyte.gz", np.zeros(4, np.uint8))
        refused(packed, "cannot read")


class TestRows:
    def test_read(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / "in" / "a.png")
        (tmp_path / "a.csv").write_text("label,image\nred,in/a.png\n")
        (tmp_path / "a.jsonl").write_text('{"image": "in/a.png", "label": 3}\n')
        for name, label in (("a.csv", "red"), ("a.jsonl", "3")):
            (row,) = rows_of(task_of("image-classification"), tmp_path / name)
            assert (row.item, row.label) == (tmp_path / "in" / "a.png", label)
            assert row.line == (2 if name == "a.csv" else 1)

    def test_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,label\nx,y\n")
        refused(tmp_path / "a.csv", "has no image", "text, label")
        (tmp_path / "a.csv").write_text("image,label\nno.png,y\n")
        refused(tmp_path / "a.csv", "line 2", "no.png", "no file beside it")
        (tmp_path / "a.txt").write_text("")
        refused(tmp_path / "a.txt", "no labelled pictures")

    def test_texts_stay_texts(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("text,label\nx,y\n")
        assert rows_of(task_of("text-classification"), tmp_path / "a.csv")[0].item == "x"


def test_a_picture_written_as_text_is_no_path(tmp_path):
    (tmp_path / "rows.csv").write_text("image,label\n" + "a" * 5000 + ",cat\n")
    with pytest.raises(DataError, match=r"line 2 names 'a{80}…', which is no file"):
        read_pictures(tmp_path / "rows.csv")
