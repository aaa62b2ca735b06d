from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployfa.assets import fetch
from deployfa.data import label_names, read_rows
from deployfa.errors import InputError, OutputExistsError
from deployfa.vader import prepare_vader

NAMES = ["movies_train", "movies_test", "tweets", "amazon", "nyt"]


def raw(file: str) -> list[tuple[int, float, str]]:
    """Place, mean and text of each sentence, read another way than the library does."""
    content = (fetch("vader") / f"{file}_GroundTruth.txt").read_bytes().decode("utf-8")
    lines = [line.split("\t") for line in content.rstrip("\r\n").split("\r\n")]
    return [(place, float(mean), text) for place, (_, mean, text) in enumerate(lines)]


def texts(path: Path) -> set[str]:
    return {row.text for row in read_rows(path)}


def test_sizes_and_labels(vader_files: dict[str, Path]) -> None:
    rows = {name: read_rows(path) for name, path in vader_files.items()}
    assert list(rows) == NAMES
    assert {name: len(found) for name, found in rows.items()} == {
        "movies_train": 3000,
        "movies_test": 2000,
        "tweets": 1500,
        "amazon": 1500,
        "nyt": 1500,
    }
    for found in rows.values():
        assert label_names(found) == ["negative", "positive"]
        smaller = min(sum(row.label == name for row in found) for name in ("negative", "positive"))
        assert smaller > 0.25 * len(found)


def test_a_label_is_the_sign_of_the_mean_rating(vader_files: dict[str, Path]) -> None:
    means = {text.replace("&amp;", "&"): mean for _, mean, text in raw("movieReviewSnippets")}
    for name in ("movies_train", "movies_test"):
        for row in read_rows(vader_files[name]):
            mean = means[row.text]
            assert abs(mean) >= 0.5
            assert row.label == ("positive" if mean > 0 else "negative")


def test_no_text_twice(vader_files: dict[str, Path]) -> None:
    every = [row.text.strip().casefold() for path in vader_files.values() for row in read_rows(path)]
    assert len(every) == len(set(every))


def blocks_on_both_sides(train: set[str], test: set[str], block: int) -> int:
    sides: dict[int, set[str]] = {}
    for place, _, text in raw("movieReviewSnippets"):
        clean = text.replace("&amp;", "&")
        for side, members in (("train", train), ("test", test)):
            if clean in members:
                sides.setdefault(place // block, set()).add(side)
    return sum(len(found) == 2 for found in sides.values())


def test_no_block_is_on_both_sides(vader_files: dict[str, Path]) -> None:
    train, test = texts(vader_files["movies_train"]), texts(vader_files["movies_test"])
    assert blocks_on_both_sides(train, test, 25) == 0
    # a split by sentence is what the check must see: swap a hundred rows
    moved_out, moved_in = set(sorted(train)[:100]), set(sorted(test)[:100])
    assert blocks_on_both_sides(train - moved_out | moved_in, test - moved_in | moved_out, 25) > 50


def test_entities_and_letters_survive(vader_files: dict[str, Path], tmp_path: Path) -> None:
    files = prepare_vader(tmp_path / "all", train_size=100, test_size=9999, shifted_size=9999, min_score=0.01)
    every = "\n".join(row.text for path in files.values() for row in read_rows(path))
    assert not re.search(r"&#?\w+;", every)
    assert "&" in every and "<3" in every
    assert "&amp;#39;" in "".join(text for _, _, text in raw("tweets") + raw("amazonReviewSnippets"))
    assert "café" in every.casefold() or "é" in every
    assert "Ã" not in every and "\ufffd" not in every


def test_one_seed_gives_the_same_files_and_another_does_not(vader_files: dict[str, Path], tmp_path: Path) -> None:
    again = prepare_vader(tmp_path / "again")
    other = prepare_vader(tmp_path / "other", seed=1)
    for name in NAMES:
        assert again[name].read_bytes() == vader_files[name].read_bytes()
        assert other[name].read_bytes() != vader_files[name].read_bytes()


def test_too_many_training_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"99999 training rows asked for, but there are 1.... rows"):
        prepare_vader(tmp_path / "out", train_size=99999)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"train_size": 0}, {"block": 0}, {"min_score": 0}, {"min_score": 5}])
def test_an_option_out_of_range(tmp_path: Path, option: dict[str, int]) -> None:
    with pytest.raises(InputError, match="change the options"):
        prepare_vader(tmp_path / "out", **option)  # type: ignore[arg-type]


def test_what_is_there_stays_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        prepare_vader(out)
    assert (out / "mine.txt").read_text() == "mine"
    assert prepare_vader(out, force=True)["nyt"].is_file()
