"""A patch: the tensors in which one adapter's graph differs from a bundle's, and nothing else of it.

One safetensors file.  Its tensors bear the names of the bundle's initializers; its metadata is ``PatchMeta`` as JSON,
and a sha256 over that and every tensor, so that a damaged file is noticed whichever byte it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from deployfa.adapter import BaseReference
from deployfa.adapter.safetensors_io import read_safetensors, write_safetensors
from deployfa.atomic import write_file
from deployfa.bundle.manifest import AdapterSummary, Manifest
from deployfa.edits import Array
from deployfa.errors import AdapterFormatError, BundleError, InputError
from deployfa.graph.storage import load_graph

__all__ = ["PATCH_FORMAT", "Patch", "PatchMeta", "check_patch", "graph_files", "read_patch", "write_patch"]

PATCH_FORMAT = "deployfa-patch/1"


class PatchMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What a patch is of, what it is for, and how right it was when it was made.

    ``bundle``: file → sha256 of the graph and its weights that the tensors belong in.  ``noise`` and ``noise_max_abs``
    are the adapted model's float32 noise on the inputs of the bundle's stored reference, ``error`` is the patched
    session's, both against ``truth``: float64 bytes, (rows, labels), row by row as that reference has them.
    ``base_answers``, float32 of the same shape, are the model's without the edits.
    """

    bundle: dict[str, str]
    fusion: str
    base: BaseReference
    adapter: AdapterSummary
    plan: dict[str, Any]
    labels: list[str]
    versions: dict[str, str]
    noise: float
    noise_max_abs: float
    error: float
    truth: bytes
    base_answers: bytes


@dataclass(frozen=True, eq=False)
class Patch:
    """A whole patch; ``tensors``: initializer of the bundle's graph → its values for this adapter."""

    path: Path
    meta: PatchMeta
    tensors: Mapping[str, Array]

    @property
    def tensor_bytes(self) -> int:
        return sum(array.nbytes for array in self.tensors.values())

    def answers(self, rows: Sequence[int]) -> Iterator[tuple[Array, Array]]:
        """``truth`` and ``base_answers`` in pieces of so many ``rows``; ``BundleError`` if they are not that many."""
        truth, base = np.frombuffer(self.meta.truth, "<f8"), np.frombuffer(self.meta.base_answers, "<f4")
        total = sum(rows)
        if not total or truth.size % total or truth.size != base.size:
            raise BundleError(f"'{self.path}' was not measured on the reference of this bundle; make the patch again")
        ends = np.cumsum(rows)[:-1]
        yield from zip(np.split(truth.reshape(total, -1), ends), np.split(base.reshape(total, -1), ends), strict=True)


def graph_files(manifest: Manifest) -> dict[str, str]:
    """File → sha256 of the graph and its weights: what a patch belongs to."""
    names = (manifest.graph.file, f"{manifest.graph.file}.data")
    return {name: manifest.files[name] for name in names if name in manifest.files}


def write_patch(path: Path, tensors: Mapping[str, Array], meta: PatchMeta, *, force: bool = False) -> None:
    """Write the file, whole or not at all; the same tensors and metadata give the same bytes."""
    encoded = msgspec.json.encode(meta, order="deterministic")
    header = {"format": PATCH_FORMAT, "meta": encoded.decode(), "sha256": _digest(encoded, tensors)}
    with write_file(path, force=force) as partial:
        write_safetensors(partial, tensors, header)


def read_patch(path: Path) -> Patch:
    """Raises ``InputError`` if there is no such file, ``BundleError`` if it is no patch or not the one written."""
    if not path.is_file():
        raise InputError(f"no patch at '{path}'; make one with: deployfa export --delta BUNDLE --out {path.name}")
    try:
        tensors, header = read_safetensors(path)
    except AdapterFormatError as error:
        raise BundleError(f"'{path}' is not a whole patch file; copy it again") from error
    if header.get("format") != PATCH_FORMAT:
        raise BundleError(f"'{path}' is not a patch ({PATCH_FORMAT}); make one with: deployfa export --delta BUNDLE")
    encoded = header.get("meta", "").encode()
    if header.get("sha256") != _digest(encoded, tensors):
        raise BundleError(f"'{path}' is not the patch that was exported (sha256 differs); copy it again")
    try:
        meta = msgspec.json.decode(encoded, type=PatchMeta)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BundleError(f"'{path}' has broken metadata ({error}); written by another version?") from error
    return Patch(path, meta, tensors)


def check_patch(patch: Patch, bundle: Path, manifest: Manifest) -> None:
    """Raise ``BundleError`` unless ``patch`` was made for this bundle and every tensor has its place in the graph."""
    if patch.meta.bundle != graph_files(manifest):
        raise BundleError(
            f"'{patch.path}' is a patch for another bundle (sha256 of the graph differs from that of '{bundle}'); "
            "run it with the bundle it was exported with, or export it again with --delta this one"
        )
    labels = patch.meta.labels
    if len(set(labels)) != len(labels):
        raise BundleError(f"'{patch.path}' names a label twice; make the patch again")
    stored = load_graph(bundle / manifest.graph.file).graph.initializers
    for name, array in patch.tensors.items():
        tensor = stored[name].const_value if name in stored else None
        if tensor is None:
            raise BundleError(f"'{patch.path}' holds '{name}', which the graph of '{bundle}' has not; export it again")
        if _type(tensor) != (array.dtype.name, array.shape):
            raise BundleError(
                f"'{patch.path}': '{name}' is {array.dtype.name} {[*array.shape]}, in the graph of '{bundle}' it is "
                f"{_type(tensor)[0]} {[*_type(tensor)[1]]}; export the patch again"
            )


def _type(tensor: ir.TensorProtocol) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype.numpy().name, tuple(tensor.shape.numpy())


def _digest(meta: bytes, tensors: Mapping[str, Array]) -> str:
    found = hashlib.sha256(meta)
    for name, array in sorted(tensors.items()):
        found.update(f"\0{name}\0{array.dtype.name}\0{[*array.shape]}\0".encode())
        found.update(array.tobytes())
    return found.hexdigest()
