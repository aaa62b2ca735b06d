"""Labelled pictures from the forms that people keep them in.

=============================================  ==========================================================
a folder of class folders                      ``cats/1.jpg``, ``dogs/2.png``: a folder's name is the label
``FILE.npz``                                   ``images`` (N, H, W[, C]) uint8, ``labels`` (N,), and the names
                                               of integer labels, if any, in ``label_names``
``X-images-idx3-ubyte[.gz]``                   MNIST's own, with ``X-labels-idx1-ubyte[.gz]`` beside it
``FILE.csv``, ``FILE.jsonl``                   columns ``image``, a path from the file's folder, and ``label``
=============================================  ==========================================================

Whatever is wrong is a ``DataError``: one line that says where, and what to do.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deployfa.data import Row, read_rows
from deployfa.edits import Array
from deployfa.errors import DataError

__all__ = ["FORMS", "LabelledPicture", "read_pictures"]

#: For help texts.
FORMS = "a folder of class folders, .npz, MNIST's idx pair, or CSV/JSONL with image,label"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}
_IDX = re.compile(r"(?P<start>.*[-.]|)images(?P<dash>[-.])idx3-ubyte(?P<packed>\.gz)?")
_UINT8 = 0x08


@dataclass(frozen=True, eq=False)
class LabelledPicture(Row):
    """One example: a path or uint8 pixels.  Its ``text`` says where it is from, for errors."""

    image: Path | Array = field(default_factory=Path)

    @property
    def item(self) -> Path | Array:
        return self.image


def read_pictures(path: Path, *, need_label: bool = True) -> list[Row]:
    """The pictures of ``path``, in order; folders sorted by name.  Files that they name are there, but not yet read.

    Raises ``DataError`` for any other form, no pictures, or a picture without a label.
    """
    if path.is_dir():
        found = list(_from_folder(path))
    elif path.suffix.lower() == ".npz":
        found = _from_npz(path, need_label)
    elif _IDX.fullmatch(path.name):
        found = _from_idx(path)
    elif path.suffix.lower() in {".csv", ".jsonl", ".ndjson"}:
        found = _from_rows(path, need_label)
    elif not path.exists():
        raise DataError(f"'{path}' does not exist; check the path")
    else:
        raise DataError(f"'{path}' holds no labelled pictures; give {FORMS}")
    if not found:
        raise DataError(f"'{path}' holds no pictures; give {FORMS}")
    return found


def _from_folder(root: Path) -> Iterator[Row]:
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise DataError(f"'{root}' has no folders in it; put the pictures of each label into a folder of its name")
    for folder in folders:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"'{folder}' holds no pictures ({', '.join(sorted(_SUFFIXES))}); fill it or remove it")
        for file in files:
            yield LabelledPicture(f"'{file}'", folder.name, image=file)


def _from_rows(path: Path, need_label: bool) -> list[Row]:
    found: list[Row] = []
    for row in read_rows(path, need_label=need_label, column="image"):
        image = path.parent / row.text
        if not _is_file(image):
            shown = row.text if len(row.text) <= 80 else f"{row.text[:80]}…"
            raise DataError(f"'{path}' line {row.line} names '{shown}', which is no file beside it; mend the path")
        found.append(LabelledPicture(f"'{image}'", row.label, row.line, image=image))
    return found


def _is_file(path: Path) -> bool:
    """A name that no file can have, such as a picture written as text, is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _from_npz(path: Path, need_label: bool) -> list[Row]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            missing = [name for name in ("images", *(["labels"] if need_label else [])) if name not in names]
            if missing:
                raise DataError(
                    f"'{path}' has no array '{missing[0]}' (found: {', '.join(sorted(names)) or 'none'}); "
                    "save it with numpy.savez(FILE, images=…, labels=…)"
                )
            images = archive["images"]
            labels = archive["labels"] if "labels" in names else None
            known = archive["label_names"] if "label_names" in names else None
    except FileNotFoundError:
        raise DataError(f"'{path}' does not exist; check the path") from None
    except DataError:
        raise
    except Exception as error:  # of zipfile, zlib, numpy and the parser of its headers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot read '{path}' ({reason}); save plain arrays with numpy.savez") from error
    _check_images(path, images)
    written = [None] * len(images) if labels is None else _label_texts(path, labels, known, len(images))
    return _listed(path, images, written)


def _check_images(path: Path, images: Any) -> None:
    if images.dtype != np.uint8:
        raise DataError(f"'{path}' has images of {images.dtype}; save uint8 from 0 to 255")
    if images.ndim not in {3, 4} or (images.ndim == 4 and images.shape[3] not in {1, 3, 4}):
        raise DataError(
            f"'{path}' has images of shape {images.shape}; save (pictures, height, width) or that with 1 or 3 channels"
        )


def _label_texts(path: Path, labels: Any, known: Any, count: int) -> list[str]:
    if labels.shape != (count,):
        raise DataError(f"'{path}' has labels of shape {labels.shape} for {count} images; save one for each")
    if known is None:
        if labels.dtype.kind not in "iuUb":
            raise DataError(f"'{path}' has labels of {labels.dtype}; save integers or texts")
        texts = [str(label).strip() for label in labels.tolist()]
    else:
        if known.ndim != 1 or known.dtype.kind != "U":
            raise DataError(f"'{path}' has label_names that are no list of texts; save numpy.array(['cat', 'dog'])")
        if labels.dtype.kind not in "iu":
            raise DataError(f"'{path}' has label_names and labels of {labels.dtype}; save labels as their positions")
        wrong = labels[(labels < 0) | (labels >= len(known))]
        if len(wrong):
            raise DataError(f"'{path}' has label {wrong[0]} and {len(known)} label_names; name every label")
        texts = [str(known[label]).strip() for label in labels.tolist()]
    empty = next((number for number, text in enumerate(texts) if not text), None)
    if empty is not None:
        raise DataError(f"'{path}' has an empty label for picture {empty + 1}; fill it in")
    return texts


def _from_idx(path: Path) -> list[Row]:
    match = _IDX.fullmatch(path.name)
    assert match is not None  # the caller looked
    stem = f"{match['start']}labels{match['dash']}idx1-ubyte"
    candidates = [path.with_name(stem + (match["packed"] or "")), path.with_name(stem), path.with_name(f"{stem}.gz")]
    beside = next((file for file in candidates if file.is_file()), None)
    if beside is None:
        raise DataError(f"'{path}' has no '{candidates[0].name}' beside it; put the labels there")
    images, labels = _read_idx(path, 3), _read_idx(beside, 1)
    if len(images) != len(labels):
        raise DataError(f"'{path}' has {len(images)} images, '{beside.name}' {len(labels)} labels; take them as a pair")
    return _listed(path, images, [str(label) for label in labels.tolist()])


def _read_idx(path: Path, dimensions: int) -> Array:
    """The array of uint8 in ``path``.  Source: http://yann.lecun.com/exdb/mnist (the IDX file format)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            return _idx_array(path, stream, dimensions)
    except FileNotFoundError:
        raise DataError(f"'{path}' does not exist; check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read '{path}' ({error}); fetch it again") from error


def _idx_array(path: Path, stream: BinaryIO | gzip.GzipFile, dimensions: int) -> Array:
    header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UINT8, dimensions)):
        raise DataError(f"'{path}' is no IDX file of bytes in {dimensions} dimensions; fetch it again")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = 1
    for length in shape:
        size *= length
    # in pieces: a header can promise more than there is memory
    content = bytearray()
    while len(content) <= size and (piece := stream.read(1 << 20)):
        content += piece
    if len(content) != size:
        held = "more" if len(content) > size else f"{len(content):,}"
        raise DataError(f"'{path}' promises {size:,} bytes and holds {held}; fetch it again")
    return np.frombuffer(bytes(content), np.uint8).reshape(shape)


def _listed(path: Path, images: Array, labels: Sequence[str | None]) -> list[Row]:
    return [
        LabelledPicture(f"picture {number} of '{path}'", label, image=image)
        for number, (image, label) in enumerate(zip(images, labels, strict=True), start=1)
    ]
