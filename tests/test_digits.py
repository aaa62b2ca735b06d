"""Real digits: the same files every time, every digit equally often, no picture on both sides."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from deployfa.digits import prepare_digits
from deployfa.errors import InputError, OutputExistsError
from deployfa.image_data import read_pictures


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return prepare_digits(tmp_path_factory.mktemp("digits") / "data", train_size=3000, test_size=1500)


def test_the_files_are_labelled_pictures(files: dict[str, Path]) -> None:
    assert list(files) == ["mnist_train", "mnist_test", "digits", "seven"]
    for name, (count, edge) in {"mnist_train": (3000, 28), "mnist_test": (1500, 28), "digits": (1500, 8)}.items():
        rows = read_pictures(files[name])
        assert len(rows) == count
        assert {row.item.shape for row in rows} == {(edge, edge)}
        counts = np.unique([row.label for row in rows], return_counts=True)
        assert list(counts[0]) == [str(digit) for digit in range(10)]
        if name != "digits":
            assert set(counts[1]) == {count // 10}
        # white on black, in the whole range
        pixels = np.stack([row.item for row in rows])
        assert pixels.max() == 255
        assert np.median(pixels[:, 0, 0]) == 0


def test_the_seven_is_one_of_the_test(files: dict[str, Path]) -> None:
    from PIL import Image

    with Image.open(files["seven"]) as picture:
        seven = np.asarray(picture)
    test = np.load(files["mnist_test"])
    assert 7 in {
        int(label) for image, label in zip(test["images"], test["labels"], strict=True) if (image == seven).all()
    }


def test_no_picture_is_on_both_sides(files: dict[str, Path]) -> None:
    seen = [{image.tobytes() for image in np.load(files[name])["images"]} for name in ("mnist_train", "mnist_test")]
    assert not seen[0] & seen[1]


def test_a_seed_is_the_same_split(files: dict[str, Path], tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        again = prepare_digits(tmp_path / str(seed), train_size=3000, test_size=1500, seed=seed)
        for name in ("mnist_train", "mnist_test"):
            first, second = (np.load(each[name])["images"] for each in (files, again))
            assert np.array_equal(first, second) is same


def test_without_scikit_learn_there_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("deployfa.digits.find_spec", lambda name: None)
    lines: list[str] = []
    found = prepare_digits(tmp_path / "data", progress=lines.append)
    assert list(found) == ["mnist_train", "mnist_test", "seven"]
    assert any("pip install scikit-learn" in line for line in lines)


def test_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave none for the test"):
        prepare_digits(tmp_path / "a", train_size=5000)
    with pytest.raises(InputError, match="leave none for the test"):
        prepare_digits(tmp_path / "a", train_size=4998)
    with pytest.raises(InputError, match="10 or more"):
        prepare_digits(tmp_path / "a", test_size=1)
    with pytest.raises(OutputExistsError):
        prepare_digits(files["digits"].parent)
    assert not (tmp_path / "a").exists()
