"""Rows of text and label, or of prompt and completion, from CSV or JSONL, with the line number in every complaint."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployfa.errors import DataError

__all__ = ["Row", "label_ids", "label_names", "read_language", "read_rows"]

_JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One example.  ``label`` is ``None`` only where labels were not asked for and the file has none; ``completion`` is
    what a language model shall answer to ``text``, where that is a prompt."""

    text: str
    label: str | None = None
    line: int = field(default=0, compare=False)
    """Where the row starts in its file, counted from 1; 0 for a row that came from no file."""
    completion: str | None = None

    @property
    def item(self) -> Any:
        """What the model is fed."""
        return self.text


def read_rows(path: Path, *, need_label: bool = True, column: str = "text") -> list[Row]:
    """The rows of ``path``, in order: ``.csv`` with a header, or ``.jsonl``/``.ndjson`` with one object a line.

    Columns or keys ``text`` (or another ``column``) and, with ``need_label``, ``label``; others are ignored.  UTF-8,
    with or without a byte order mark.  Empty lines are skipped.  A JSON label may be a string, an integer or a boolean;
    it is read as text.

    Raises ``DataError``, naming the line, for anything else: no such file, another encoding, no rows, a missing column,
    an empty text or label, a line with too many cells, an unparsable line.
    """
    columns = (column, "label") if need_label else (column,)
    # a label that nobody needs is still read: verify says how often the model is right
    return [_row(path, line, values, need_label, column) for line, values in _records(path, columns, also=("label",))]


def read_language(path: Path, *, most: int | None = None) -> list[Row]:
    """Rows to train or to score a language model on, in order; ``most`` of them, or of the lines of a text.

    ``.txt``: one text, its lines ended by line feeds, cut into pieces as long as the model reads them.  ``.csv``,
    ``.jsonl``: a column ``text``, or ``prompt`` and ``completion``, of which only the completion is learnt; others are
    ignored.  Raises what ``read_rows`` raises.
    """
    if path.suffix.lower() == ".txt":
        # how an editor ends its lines is no part of the text
        text = _decode(path).replace("\r\n", "\n").replace("\r", "\n")
        if not text.strip():
            raise DataError(f"'{path}' holds no text; give a file with some")
        return [Row("\n".join(text.split("\n")[:most]), line=1)]
    if path.suffix.lower() not in (".csv", *_JSON_SUFFIXES):
        raise DataError(f"'{path}' is neither .txt, .csv nor .jsonl; convert it, or rename it if it is one of them")
    columns = ("prompt", "completion") if "prompt" in _column_names(path) else ("text",)
    rows = []
    for line, values in _records(path, columns):
        texts = [_filled(path, line, values[name], name) for name in columns]
        rows.append(Row(texts[0], line=line, completion=texts[1] if len(texts) > 1 else None))
    return rows[:most]


def label_names(rows: Sequence[Row]) -> list[str]:
    """The labels that occur, sorted; the position of a name is its id."""
    return sorted({row.label for row in rows if row.label is not None})


def label_ids(rows: Sequence[Row], labels: Sequence[str]) -> list[int]:
    """The id of each row's label in ``labels``.

    Raises ``DataError`` for a row without a label, and for a label that is not in ``labels``: the model has no output
    for it.
    """
    ids = {name: index for index, name in enumerate(labels)}
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"line {row.line}" if row.line else f"row {number}"
        if row.label is None:
            raise DataError(f"{where} has no label; add one")
        if row.label not in ids:
            raise DataError(
                f"label '{row.label}' in {where} was not seen in training; known labels: {', '.join(labels)}"
            )
        found.append(ids[row.label])
    return found


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"'{path}' does not exist; check the path") from None
    except OSError as error:
        raise DataError(f"cannot read '{path}' ({error.strerror}); give a readable file") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"'{path}' is not UTF-8 at line {line}; save it as UTF-8") from error


def _records(path: Path, columns: Sequence[str], also: Sequence[str] = ()) -> list[tuple[int, dict[str, object]]]:
    """Line and values of every row; ``columns`` must be there, and ``also`` are read where they are."""
    content = _content(path)
    is_csv = path.suffix.lower() == ".csv"
    found = list((_csv_records if is_csv else _json_records)(path, content, tuple(columns), tuple(also)))
    if not found:
        raise DataError(f"'{path}' holds no rows; give a file with at least one")
    return found


def _content(path: Path) -> str:
    if path.suffix.lower() not in (".csv", *_JSON_SUFFIXES):
        raise DataError(f"'{path}' is neither .csv nor .jsonl; convert it, or rename it if it is one of them")
    return _decode(path)


def _column_names(path: Path) -> list[str]:
    """Those of the header, or of the first object; none if there is no telling."""
    import msgspec

    content = _content(path)
    if path.suffix.lower() == ".csv":
        try:
            header = next((cells for cells in csv.reader(io.StringIO(content, newline="")) if cells), [])
        except csv.Error:
            return []
        return [cell.strip() for cell in header]
    first = next((line for line in content.split("\n") if line.strip()), "")
    try:
        value = msgspec.json.decode(first)
    except (msgspec.DecodeError, RecursionError):
        return []
    return list(value) if isinstance(value, dict) else []


def _csv_records(
    path: Path, content: str, columns: tuple[str, ...], also: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, object]]]:
    # strict: an unclosed quotation mark would otherwise swallow the rest of the file into one text
    # the limit of csv is one for the process, 128 KiB: a chapter of a book is longer
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                _check_columns(path, header, columns, also)
                continue
            if len(cells) > len(header):
                raise DataError(
                    f"'{path}' line {start} has {len(cells)} cells, its header {len(header)}; "
                    f'put texts that hold a comma in double quotes, "like, this"'
                )
            values = dict(zip(header, cells, strict=False))
            yield start, {**dict.fromkeys(columns, ""), **{n: values[n] for n in (*columns, *also) if n in values}}
    except csv.Error as error:
        raise DataError(f"'{path}' line {line} is not CSV ({error}); mend the quotation marks there") from error
    if header is None:
        raise DataError(f"'{path}' is empty; its first line must name the columns {' and '.join(columns)}")


def _json_records(
    path: Path, content: str, columns: tuple[str, ...], also: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, object]]]:
    import msgspec

    # split at line feeds only: str.splitlines also cuts at characters that JSON strings may hold
    for line, raw in enumerate(content.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            value: Any = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"'{path}' line {line} is not JSON ({error}); write one object a line") from error
        if not isinstance(value, dict):
            shown = ", ".join(f'"{name}": …' for name in columns)
            raise DataError(f"'{path}' line {line} is not an object; write {{{shown}}}")
        _check_columns(path, list(value), columns, also, line)
        yield line, {name: value[name] for name in (*columns, *also) if name in value}


def _check_columns(
    path: Path, found: list[str], columns: tuple[str, ...], also: tuple[str, ...], line: int | None = None
) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        place = f"'{path}'" if line is None else f"'{path}' line {line}"
        raise DataError(
            f"{place} has no {' and no '.join(missing)} (found: {', '.join(found) or 'nothing'}); "
            f"name the column with the {missing[0]} '{missing[0]}'"
        )
    twice = sorted({name for name in found if name in (*columns, *also) and found.count(name) > 1})
    if twice:
        raise DataError(f"'{path}' has the column {twice[0]} twice; rename one of them")


def _row(path: Path, line: int, values: dict[str, object], need_label: bool, column: str) -> Row:
    text = _filled(path, line, values[column], column)
    label = values.get("label")
    if isinstance(label, bool | int):
        label = str(label)
    if label is not None and not isinstance(label, str):
        raise DataError(f"'{path}' line {line} has a label that is neither text nor an integer; write it as text")
    name = label.strip() if label is not None else ""
    if need_label and not name:
        raise DataError(f"'{path}' line {line} has an empty label; fill it in or remove the line")
    return Row(text, name or None, line)


def _filled(path: Path, line: int, text: object, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        what = f"an empty {name}" if text is None or isinstance(text, str) else f"a {name} that is not a string"
        raise DataError(f"'{path}' line {line} has {what}; fill it in or remove the line")
    return text
