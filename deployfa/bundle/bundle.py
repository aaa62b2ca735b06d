"""Read a bundle, trusting nothing that its manifest does not vouch for."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from deployfa.atomic import write_file
from deployfa.bundle.manifest import ENGINES, FORMAT, MANIFEST, Manifest, Tables
from deployfa.bundle.patch import Patch, check_patch, read_patch
from deployfa.edits import Array
from deployfa.errors import BundleError
from deployfa.preprocess import TOKENIZER_FILES
from deployfa.tables import open_fleet
from deployfa.versions import installed

__all__ = ["Bundle", "sha256_file", "versions", "write_manifest"]

_PACKAGES = ("deployfa", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch", "transformers", "peft")


class Bundle:
    """An opened bundle.  ``Bundle.open`` checks it; the attributes are paths, the manifest, and the patch if any."""

    def __init__(self, path: Path, manifest: Manifest, patch: Patch | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.patch = patch

    @classmethod
    def open(cls, path: str | Path, *, check_files: bool = True, patch: str | Path | None = None) -> Bundle:
        """Open the bundle at ``path``; with ``patch``, the adapter that ``deployfa export --delta`` made it for.

        Raises ``BundleError`` if it is not one, or if a file is missing, changed, or lies outside the directory; and if
        the patch is damaged, was made for another bundle, or does not fit the graph.  Engines are held against their
        hash when one is loaded (``deployfa.bundle.engines.read_engine``): a device without the engine, or with a
        damaged one, still runs the graph, and still builds the engine again.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise BundleError(f"'{path}' is not a bundle (no {MANIFEST}); make one with: deployfa export --adapter ...")
        try:
            manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise BundleError(f"'{file}' is broken ({error}); export the bundle again") from error
        if manifest.format != FORMAT:
            raise BundleError(f"'{path}' has format {manifest.format}, this deployfa reads {FORMAT}; export it again")
        bundle = cls(path, manifest)
        bundle._check_names()
        engines = {engine.file for engine in manifest.engines}
        for name, digest in manifest.files.items():
            bundle._check_inside(name)
            if name not in engines:
                bundle._check(name, digest if check_files else None)
        if patch is not None:
            bundle.patch = read_patch(Path(patch))
            check_patch(bundle.patch, path, manifest)
        return bundle

    def _check_names(self) -> None:
        """What is read must be among the files whose sha256 the manifest vouches for."""
        manifest = self.manifest
        needed = [manifest.graph.file, manifest.reference.file]
        if manifest.tables is None:
            needed.append(self.adapter.name)
        elif manifest.tables.inputs:
            needed.append(manifest.tables.file or "")
        if manifest.slots is not None:
            needed += [manifest.slots.file, manifest.slots.idle.file]
        for engine in manifest.engines:
            # what is replaced is removed, so nothing else may pass for one
            if Path(engine.file).parent != Path(ENGINES) or Path(engine.file).suffix != ".engine":
                raise BundleError(f"'{self.path}' names '{engine.file}' as an engine; refused, export the bundle again")
            needed.append(engine.file)
        optional = (f"{manifest.graph.file}.data", *TOKENIZER_FILES)
        for name in (*needed, *(name for name in optional if (self.path / name).exists())):
            if name not in manifest.files:
                raise BundleError(f"'{self.path}': the manifest vouches for no '{name}'; export the bundle again")
        if len(set(manifest.labels)) != len(manifest.labels):
            raise BundleError(f"'{self.path}' names a label twice; export the bundle again")
        if manifest.tables is not None:
            _check_rows(self.path, manifest.tables)
        if manifest.preprocessing.max_length < 1:
            raise BundleError(f"'{self.path}' has max_length {manifest.preprocessing.max_length}; export it again")

    def _check_inside(self, name: str) -> None:
        if not (self.path / name).resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"'{self.path}': the manifest names '{name}', which lies outside the bundle; refused")

    def _check(self, name: str, digest: str | None) -> None:
        file = self.path / name
        if not file.is_file():
            raise BundleError(f"'{self.path}' lacks '{name}'; copy the whole directory again")
        if digest is not None and sha256_file(file) != digest:
            raise BundleError(f"'{self.path}/{name}' is not the file that was exported (sha256 differs); copy it again")

    @property
    def graph(self) -> Path:
        return self.path / self.manifest.graph.file

    @property
    def adapter(self) -> Path:
        return self.path / "adapter.safetensors"

    @property
    def reference(self) -> Path:
        return self.path / self.manifest.reference.file

    @property
    def labels(self) -> list[str]:
        """The patch's, if there is one."""
        return self.manifest.labels if self.patch is None else self.patch.meta.labels

    @property
    def initializers(self) -> Mapping[str, Array]:
        """What a session must put in the place of the graph's own: the patch's tensors."""
        return {} if self.patch is None else self.patch.tensors

    @cached_property
    def bound(self) -> Mapping[str, Array]:
        """What a session must be bound to: the tables of a pack that has them as inputs, read by memory map."""
        tables = self.manifest.tables
        if tables is None or not tables.inputs:
            return {}
        fleet = open_fleet(self.path / (tables.file or ""))
        if fleet.layout != tables.layout or list(fleet.members) != list(tables.adapters):
            raise BundleError(f"'{fleet.path}' holds other adapters than the manifest names; pack the bundle again")
        return fleet.arrays

    def record(self, *, parity: dict[str, Any] | None = None, bench: dict[str, Any] | None = None) -> None:
        """Put a summary into the manifest, atomically; the other one stays.

        Nothing is written for a patched bundle: its results are not the bundle's.
        """
        if self.patch is not None:
            return
        changes: dict[str, Any] = {}
        if parity is not None:
            changes["parity"] = parity
        if bench is not None:
            changes["bench"] = bench
        self.manifest = msgspec.structs.replace(self.manifest, **changes)
        write_manifest(self.path, self.manifest)


def _check_rows(path: Path, tables: Tables) -> None:
    """Names and rows tell adapters apart: two of one name would be two tenants of one answer."""
    names = [adapter.name for adapter in tables.adapters]
    if len(set(names)) != len(names) or names[:1] != ["base"]:
        raise BundleError(f"'{path}' names an adapter twice, or another than the base first; pack it again")
    for adapter in tables.adapters:
        if len(set(adapter.labels)) != len(adapter.labels):
            raise BundleError(f"'{path}': adapter '{adapter.name}' names a label twice; pack it again")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder``, atomically."""
    with write_file(folder / MANIFEST, force=True) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(manifest, order="deterministic")))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of what shapes a bundle, read without importing any of it."""
    return {"python": platform.python_version(), **installed(_PACKAGES)}
