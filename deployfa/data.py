"""Rows of text and label from CSV or JSONL, with the line number in every complaint."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployfa.errors import DataError

__all__ = ["Row", "label_ids", "label_names", "read_rows"]

_JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One example.  ``label`` is ``None`` only where labels were not asked for and the file has none."""

    text: str
    label: str | None = None
    line: int = field(default=0, compare=False)
    """Where the row starts in its file, counted from 1; 0 for a row that came from no file."""

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
    suffix = path.suffix.lower()
    if suffix != ".csv" and suffix not in _JSON_SUFFIXES:
        raise DataError(f"'{path}' is neither .csv nor .jsonl; convert it, or rename it if it is one of them")
    content = _decode(path)
    records_of = _csv_records if suffix == ".csv" else _json_records
    records = records_of(path, content, need_label, column)
    rows = [_row(path, line, text, label, need_label, column) for line, text, label in records]
    if not rows:
        raise DataError(f"'{path}' holds no rows; give a file with at least one")
    return rows


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


def _csv_records(path: Path, content: str, need_label: bool, column: str) -> Iterator[tuple[int, object, object]]:
    # strict: an unclosed quotation mark would otherwise swallow the rest of the file into one text
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
                _check_columns(path, header, need_label, column)
                continue
            if len(cells) > len(header):
                raise DataError(
                    f"'{path}' line {start} has {len(cells)} cells, its header {len(header)}; "
                    f'put texts that hold a comma in double quotes, "like, this"'
                )
            values = dict(zip(header, cells, strict=False))
            yield start, values.get(column, ""), values.get("label", "" if need_label else None)
    except csv.Error as error:
        raise DataError(f"'{path}' line {line} is not CSV ({error}); mend the quotation marks there") from error
    if header is None:
        raise DataError(f"'{path}' is empty; its first line must name the columns {column} and label")


def _json_records(path: Path, content: str, need_label: bool, column: str) -> Iterator[tuple[int, object, object]]:
    import msgspec

    # split at line feeds only: str.splitlines also cuts at characters that JSON strings may hold
    for line, raw in enumerate(content.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            value: Any = msgspec.json.decode(raw)
        except msgspec.DecodeError as error:
            raise DataError(f"'{path}' line {line} is not JSON ({error}); write one object a line") from error
        if not isinstance(value, dict):
            raise DataError(f'\'{path}\' line {line} is not an object; write {{"{column}": …, "label": …}}')
        _check_columns(path, list(value), need_label, column, line)
        label = value.get("label")
        if isinstance(label, bool | int):
            label = str(label)
        yield line, value[column], "" if label is None and need_label else label


def _check_columns(path: Path, found: list[str], need_label: bool, column: str, line: int | None = None) -> None:
    missing = [name for name in ((column, "label") if need_label else (column,)) if name not in found]
    if missing:
        place = f"'{path}'" if line is None else f"'{path}' line {line}"
        raise DataError(
            f"{place} has no {' and no '.join(missing)} (found: {', '.join(found) or 'nothing'}); "
            f"name the column with the {missing[0]} '{missing[0]}'"
        )
    twice = sorted({name for name in found if name in (column, "label") and found.count(name) > 1})
    if twice:
        raise DataError(f"'{path}' has the column {twice[0]} twice; rename one of them")


def _row(path: Path, line: int, text: object, label: object, need_label: bool, column: str) -> Row:
    if not isinstance(text, str) or not text.strip():
        what = f"an empty {column}" if text is None or isinstance(text, str) else f"a {column} that is not a string"
        raise DataError(f"'{path}' line {line} has {what}; fill it in or remove the line")
    if label is not None and not isinstance(label, str):
        raise DataError(f"'{path}' line {line} has a label that is neither text nor an integer; write it as text")
    name = label.strip() if label is not None else ""
    if need_label and not name:
        raise DataError(f"'{path}' line {line} has an empty label; fill it in or remove the line")
    return Row(text, name or None, line)
