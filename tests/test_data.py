from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployfa.data import Row, label_ids, label_names, read_rows
from deployfa.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def complaint(path: Path, *, need_label: bool = True) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, need_label=need_label)
    text = str(caught.value)
    assert "\n" not in text and ";" in text
    return text.replace(str(path), path.name)


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'id,text,label\n1,"good, very",positive\n\n2,"two\nlines", negative \n3,plain,x\n')
    rows = read_rows(path)
    assert rows == [Row("good, very", "positive"), Row("two\nlines", "negative"), Row("plain", "x")]
    assert [row.line for row in rows] == [2, 4, 6]


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbflabel,text\r\nno,caf\xc3\xa9\r\n")
    assert read_rows(path) == [Row("café", "no")]


def test_jsonl(tmp_path: Path) -> None:
    content = '{"text": "a", "label": "x", "id": 3}\n\n{"text": "b\u2028c", "label": 1}\n{"text": "d", "label": true}'
    rows = read_rows(write(tmp_path, "a.jsonl", content))
    assert rows == [Row("a", "x"), Row("b\u2028c", "1"), Row("d", "True")]
    assert [row.line for row in rows] == [1, 3, 4]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", "text\nhello\n"), ("a.csv", "text,label\nhello,\n"), ("a.jsonl", '{"text": "hello"}')],
)
def test_labels_are_optional_only_when_not_asked_for(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path, name, content)
    assert read_rows(path, need_label=False) == [Row("hello")]
    assert "label" in complaint(path)


def test_labels_are_read_where_they_are_even_when_not_asked_for(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "a.csv", "text,label\nhello,x\n"), need_label=False) == [Row("hello", "x")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "text,label\n", "'a.txt' is neither .csv nor .jsonl"),
        ("a.csv", "", "'a.csv' is empty"),
        ("a.csv", "text,label\n", "'a.csv' holds no rows"),
        ("a.jsonl", "\n\n", "'a.jsonl' holds no rows"),
        ("a.csv", "sentence,label\nx,y\n", "has no text (found: sentence, label)"),
        ("a.csv", "text;label\nx;y\n", "has no text and no label (found: text;label)"),
        ("a.csv", "text,label,text\nx,y,z\n", "has the column text twice"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"sentence": "x", "label": "y"}', "line 2 has no text (found: sent"),
        ("a.csv", "text,label\nok,x\n  ,x\n", "line 3 has an empty text"),
        ("a.jsonl", '{"text": "", "label": "x"}', "line 1 has an empty text"),
        ("a.jsonl", '{"text": 5, "label": "x"}', "line 1 has a text that is not a string"),
        ("a.csv", 'text,label\n"two\nlines",x\nok,\n', "line 4 has an empty label"),
        ("a.csv", "text,label\nok\n", "line 2 has an empty label"),
        ("a.jsonl", '{"text": "a", "label": null}', "line 1 has an empty label"),
        ("a.jsonl", '{"text": "a", "label": ["x"]}', "line 1 has a label that is neither"),
        ("a.csv", "text,label\ngood, very,x\n", "line 2 has 3 cells, its header 2"),
        ("a.csv", 'text,label\nok,x\n"open,x\nmore,y\n', "line 3 is not CSV"),
        ("a.csv", b"text,label\nok,x\ncaf\xe9,y\n", "is not UTF-8 at line 3"),
        ("a.csv", "text,label\nok,x\n".encode("utf-16"), "is not UTF-8 at line 1"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '["a", "x"]', "line 1 is not an object"),
    ],
)
def test_a_complaint_names_the_place(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    assert expected in complaint(write(tmp_path, name, content))


def test_no_such_file(tmp_path: Path) -> None:
    assert "'gone.csv' does not exist" in complaint(tmp_path / "gone.csv")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    assert "cannot read 'folder.csv'" in complaint(tmp_path / "folder.csv")


def test_ids_follow_the_sorted_names() -> None:
    rows = [Row("a", "pos"), Row("b", "neg"), Row("c", "pos"), Row("d")]
    assert label_names(rows) == ["neg", "pos"]
    assert label_ids(rows[:3], ["neg", "pos"]) == [1, 0, 1]
    assert label_ids(rows[:3], ["pos", "neg"]) == [0, 1, 0]


def test_an_unseen_label_is_named_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,label\na,neg\nb,neutral\n")
    with pytest.raises(DataError, match="label 'neutral' in line 3 was not seen in training; known labels: neg, pos"):
        label_ids(read_rows(path), ["neg", "pos"])
    with pytest.raises(DataError, match="label 'neutral' in row 2 "):
        label_ids([Row("a", "neg"), Row("b", "neutral")], ["neg", "pos"])
    with pytest.raises(DataError, match="row 1 has no label; "):
        label_ids([Row("a")], ["neg", "pos"])


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, pairs: list) -> None:
    import csv

    # surrogates have no UTF-8; a text or label of spaces is refused, which the test above shows
    pairs = [(t, n.strip()) for t, n in pairs if t.strip() and n.strip() and (t + n).isprintable()]
    if not pairs:
        return
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *pairs])
    assert read_rows(path) == [Row(text, label) for text, label in pairs]
