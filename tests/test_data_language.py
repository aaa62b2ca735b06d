"""Texts, and prompts with completions, from files: what is read, and the line in every complaint."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployfa.data import Row, read_language, read_rows
from deployfa.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def complaint(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_language(path)
    text = str(caught.value)
    assert "\n" not in text and ";" in text
    return text.replace(str(path), path.name)


def test_prompts_and_completions(tmp_path: Path) -> None:
    csv = write(tmp_path, "a.csv", 'id,completion,prompt\n1," yes, two\nlines",Is it?\n2, no,Was it?\n')
    assert read_language(csv) == [
        Row("Is it?", completion=" yes, two\nlines"),
        Row("Was it?", completion=" no"),
    ]
    assert [row.line for row in read_language(csv)] == [2, 4]
    jsonl = write(tmp_path, "a.jsonl", '\n{"prompt": "Is it?", "completion": " yes\\r\\n", "label": 3}\n')
    assert read_language(jsonl) == [Row("Is it?", completion=" yes\r\n")]
    assert [row.line for row in read_language(jsonl)] == [2]


def test_texts(tmp_path: Path) -> None:
    """A label beside them is no label of a language model; a completion without a prompt is none."""
    assert read_language(write(tmp_path, "a.csv", "text,label,completion\n hello ,x,y\n")) == [Row(" hello ")]
    assert read_language(write(tmp_path, "a.jsonl", '{"text": "a", "label": ["x"]}')) == [Row("a")]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    text = "first line\n\n  third\u2028line, café\n"
    (row,) = read_language(write(tmp_path, "a.txt", text))
    assert (row.text, row.line, row.completion) == (text, 1, None)


def test_only_as_much_as_is_asked_for(tmp_path: Path) -> None:
    """Lines of a text: a book is one row, and nobody waits for all of it."""
    texts = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"}')
    assert [row.text for row in read_language(texts, most=2)] == ["a", "b"]
    (book,) = read_language(write(tmp_path, "a.txt", "a b\u2028c\n\nd\ne\n"), most=3)
    assert book.text == "a b\u2028c\n\nd"
    # what is wrong further down is still wrong
    assert "line 2 is not JSON" in complaint(write(tmp_path, "a.jsonl", '{"text": "a"}\nhello'))


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_an_editor_are_no_part_of_a_text(tmp_path: Path, end: str) -> None:
    lines = "\ufefffirst\nsecond\n\nthird\n".replace("\n", end)
    (row,) = read_language(write(tmp_path, "A.TXT", lines))
    assert row.text == "first\nsecond\n\nthird\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_with_any_line_end(tmp_path: Path, end: str) -> None:
    path = write(tmp_path, "a.csv", "\ufeffprompt,completion\nIs it?,yes\n".replace("\n", end))
    assert read_language(path) == [Row("Is it?", completion="yes")]


def test_a_text_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    """Longer than the field limit of Python's csv, in either reader."""
    text = "a word, " * 40_000
    path = write(tmp_path, "a.csv", f'text,label\n"{text}",x\n')
    assert read_language(path) == [Row(text)]
    assert read_rows(path) == [Row(text, "x")]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.md", "hello", "'a.md' is neither .txt, .csv nor .jsonl"),
        ("a.txt", "", "'a.txt' holds no text"),
        ("a.txt", b"\xef\xbb\xbf \r\n", "'a.txt' holds no text"),
        ("a.txt", b"ok\ncaf\xe9\n", "'a.txt' is not UTF-8 at line 2"),
        ("a.csv", "", "'a.csv' is empty"),
        ("a.csv", "text\n", "'a.csv' holds no rows"),
        ("a.csv", "prompt,completion\n", "'a.csv' holds no rows"),
        ("a.jsonl", "\n", "'a.jsonl' holds no rows"),
        ("a.csv", "sentence,label\nx,y\n", "'a.csv' has no text (found: sentence, label)"),
        ("a.csv", "prompt,text\nx,y\n", "'a.csv' has no completion (found: prompt, text)"),
        ("a.csv", "prompt,completion,prompt\nx,y,z\n", "has the column prompt twice"),
        ("a.csv", "prompt,completion\nok,ok\nIs it?,\n", "'a.csv' line 3 has an empty completion"),
        ("a.csv", "prompt,completion\nok,ok\nIs it?\n", "'a.csv' line 3 has an empty completion"),
        ("a.csv", "prompt,completion\n  ,yes\n", "'a.csv' line 2 has an empty prompt"),
        ("a.csv", "text\nok\n  \n", "'a.csv' line 3 has an empty text"),
        ("a.csv", "prompt,completion\nIs it, then?,yes\n", "'a.csv' line 2 has 3 cells, its header 2"),
        ("a.csv", 'text\nok\n"open\nmore\n', "'a.csv' line 3 is not CSV"),
        ("a.csv", '"prompt,completion\nx,y\n', "'a.csv' line 1 is not CSV"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"text": "a"}', "line 2 has no prompt and no completion"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "a", "completion": "b"}', "'a.jsonl' line 2 has no text"),
        ("a.jsonl", '{"prompt": "a", "completion": null}', "'a.jsonl' line 1 has an empty completion"),
        ("a.jsonl", '{"prompt": "a", "completion": 5}', "'a.jsonl' line 1 has a completion that is not a string"),
        ("a.jsonl", '{"text": "a"}\n["b"]', "'a.jsonl' line 2 is not an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', "'a.jsonl' line 2 is not JSON"),
        ("a.jsonl", "hello\n", "'a.jsonl' line 1 is not JSON"),
        ("a.jsonl", '{"text": "\\ud800"}', "'a.jsonl' line 1 is not JSON"),
        ("a.jsonl", "[" * 100_000, "'a.jsonl' line 1 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"text":' + '{"a":' * 100_000, "'a.jsonl' line 2 is not JSON"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    assert expected in complaint(write(tmp_path, name, content))


@pytest.mark.parametrize("name", ["none.txt", "none.csv", "none.jsonl"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    assert f"'{name}' does not exist" in complaint(tmp_path / name)
    (tmp_path / name).mkdir()
    assert f"cannot read '{name}' (Is a directory)" in complaint(tmp_path / name)
