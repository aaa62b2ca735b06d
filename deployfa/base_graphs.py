"""The base graph of a base model: exported once, kept in the cache under the base's fingerprint.

PyTorch runs only when the cache has no graph for that base.  An entry is a folder with ``model.onnx`` (+ weights), the
tokenizer files, and ``base.json``, which says what it was made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from filelock import FileLock

from deployfa.adapter import Adapter
from deployfa.atomic import write_directory
from deployfa.bundle.bundle import sha256_file, versions
from deployfa.cache import CACHE_VARIABLE, cache_dir
from deployfa.edits import Array
from deployfa.errors import ExportError, InputError, MissingExtraError, StorageError
from deployfa.graph.evaluate import evaluate
from deployfa.graph.storage import GRAPH, load_graph, save_graph
from deployfa.preprocess import TOKENIZER_FILES, Preprocessing, Preprocessor, open_preprocessor
from deployfa.preprocess.image_steps import PREPROCESSOR_CONFIG

__all__ = ["BaseGraph", "base_graph", "copy_preprocessor"]

#: Raised when the export changes what it writes, so that older entries are made again.
_REVISION = 4
_WEIGHTS = ("*.safetensors", "*.bin", "config.json")
#: What decides how a model is fed, and when it has answered.
_FEEDING = (PREPROCESSOR_CONFIG, "generation_config.json", *TOKENIZER_FILES)


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """``base.json``."""

    fingerprint: str
    architecture: str
    sources: dict[str, str]
    preprocessing: Preprocessing
    versions: dict[str, str]
    export_error: float
    labels: list[str]
    #: sha256 of every other file in the folder
    files: dict[str, str]


@dataclass(frozen=True, eq=False)
class BaseGraph:
    """A cached base graph.  ``made_now`` says whether PyTorch had to run for it."""

    folder: Path
    entry: _Entry
    warnings: tuple[str, ...]
    made_now: bool
    name: str

    def load(self) -> ir.Model:
        return load_graph(self.folder / GRAPH)

    @property
    def fingerprint(self) -> str:
        return self.entry.fingerprint

    @property
    def architecture(self) -> str:
        return self.entry.architecture

    @property
    def labels(self) -> list[str]:
        """The checkpoint's own names for its outputs, in order."""
        return self.entry.labels

    @property
    def preprocessing(self) -> Preprocessing:
        return self.entry.preprocessing

    def preprocessor(self) -> Preprocessor:
        """What makes this graph's feeds."""
        return open_preprocessor(self.folder, self.entry.preprocessing)

    @property
    def export_error(self) -> float:
        """Normwise relative error of the graph against PyTorch, both in float64, on the sample inputs."""
        return self.entry.export_error


def base_graph(
    adapter: Adapter,
    *,
    model: str | Path | None = None,
    allow_mismatch: bool = False,
    status: Callable[[str], None] | None = None,
) -> BaseGraph:
    """The base graph that ``adapter`` belongs on.

    ``model`` (a directory or hub id) defaults to the one that the adapter names.  Its weights are compared with the
    adapter's fingerprint: by file hash when the cache knows the files, else by loading them.  Raises
    ``BaseMismatchError`` on another base unless ``allow_mismatch``.
    """
    source = Path(model) if model is not None else None
    if (
        source is not None
        and not source.exists()
        and source.parts
        and (source.is_absolute() or source.parts[0] in "./..")
    ):
        raise InputError(f"no model at '{source}'; pass its directory or hub id with --model")
    cached = _cached(adapter, source)
    if cached is not None:
        return _noted(adapter, cached)
    name = str(model or adapter.base.name)
    if not name:
        raise InputError("the adapter names no base model; pass its directory or hub id with --model")
    if status:
        status("exporting the base model (once; the next adapter on it skips this)")
    return _noted(adapter, _export(adapter, name, allow_mismatch))


def _cached(adapter: Adapter, source: Path | None) -> BaseGraph | None:
    if adapter.base.fingerprint is None:
        return None
    folder = _folder(adapter, adapter.base.fingerprint)
    entry = _read(folder)
    if entry is None:
        return None
    if source is not None and _sources(source) != entry.sources:
        return None
    if not _same_preprocessor(entry, source or Path(adapter.base.name)):
        return None
    name = str(source.resolve()) if source is not None and source.is_dir() else str(source or adapter.base.name)
    return BaseGraph(folder, entry, (), made_now=False, name=name)


def _export(adapter: Adapter, name: str, allow_mismatch: bool) -> BaseGraph:
    try:
        from deployfa.training.base import base_fingerprint, load_base_of
    except ModuleNotFoundError as error:
        purpose = "exporting a base model that is not in the cache"
        raise MissingExtraError(error.name or "torch", "train", purpose) from error

    base = load_base_of(adapter, name)
    fingerprint = base_fingerprint(base.model, without=list(adapter.modules))
    warning = adapter.check_base(fingerprint, allow_mismatch=allow_mismatch)
    warnings = (warning,) if warning else ()
    folder = _folder(adapter, fingerprint)
    _make_cache(folder.parent)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        entry = _read(folder)
        if entry is not None and _same_preprocessor(entry, Path(name)):
            return BaseGraph(folder, entry, warnings, made_now=False, name=base.name)
        from deployfa.training.base_graph import export_base_graph, probe
        from deployfa.training.preprocessing import save_preprocessor

        graph = export_base_graph(base)
        export_error = _check(graph, *probe(base))
        with write_directory(folder, force=True) as partial:
            save_graph(graph, partial)
            preprocessing = save_preprocessor(base, partial)
            entry = _Entry(
                fingerprint=fingerprint,
                architecture=base.architecture,
                sources=_sources(Path(name)),
                preprocessing=preprocessing,
                versions=versions(),
                export_error=export_error,
                labels=_label_names(base.model.config) if base.does.labelled else [],
                files={file.name: sha256_file(file) for file in sorted(partial.iterdir()) if file.is_file()},
            )
            (partial / "base.json").write_bytes(msgspec.json.format(msgspec.json.encode(entry)))
    return BaseGraph(folder, entry, warnings, made_now=True, name=base.name)


def _noted(adapter: Adapter, base: BaseGraph) -> BaseGraph:
    """``base`` with a warning if its pictures are not prepared as those that ``adapter`` was trained on."""
    trained, image = adapter.training.get("pictures"), base.preprocessing.image
    if trained is None or image is None or trained == msgspec.json.decode(msgspec.json.encode(image)):
        return base
    warning = (
        f"the adapter was trained on pictures prepared in another way than {PREPROCESSOR_CONFIG} says now; put the old "
        "file back, or train again"
    )
    return dataclasses.replace(base, warnings=(*base.warnings, warning))


def _same_preprocessor(entry: _Entry, model: Path) -> bool:
    """Whether ``model`` is fed, and told to stop, as the one of ``entry``; what is not there has not changed."""
    files = [model / name for name in _FEEDING]
    return all(not file.is_file() or entry.sources.get(file.name) == sha256_file(file) for file in files)


def _check(graph: ir.Model, feeds: dict[str, Array], truth: Array, single: Array) -> float:
    """``‖graph - PyTorch‖ / ‖PyTorch‖``, both in float64.

    What is left in float64 is the rounding of the constants that the exporter folded in float32.  That is less than the
    rounding of a whole float32 run (``single``), so an error above that noise is a wrong graph: ``ExportError``.
    """
    (found,) = evaluate(graph, [feeds])
    scale = np.linalg.norm(truth)
    error, noise = (float(np.linalg.norm(answer - truth) / scale) for answer in (found["logits"], single))
    if not error <= noise:
        raise ExportError(
            f"the exported base graph differs from PyTorch by {error:.1e}, above float32 noise ({noise:.1e}); "
            "try other versions of torch and transformers"
        )
    return error


def _folder(adapter: Adapter, fingerprint: str) -> Path:
    """One entry per base, task and shape of the replaced modules (another number of labels is another graph)."""
    shapes = {f"{path}.{n}": a.shape for path, module in adapter.modules.items() for n, a in module.items()}
    key = json.dumps([_REVISION, fingerprint, adapter.base.task, sorted(shapes.items()), len(adapter.labels)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_dir() / "base-graphs" / f"{fingerprint.removeprefix('sha256:')[:12]}-{digest}"


def _read(folder: Path) -> _Entry | None:
    file = folder / "base.json"
    if not file.is_file():
        return None
    try:
        entry = msgspec.json.decode(file.read_bytes(), type=_Entry)
    except (msgspec.DecodeError, msgspec.ValidationError):
        # written by another version, or damaged: made again
        return None
    whole = all((folder / name).is_file() and sha256_file(folder / name) == h for name, h in entry.files.items())
    return entry if whole else None


def _make_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot write the cache '{folder}' ({error.strerror}); set {CACHE_VARIABLE} to a folder that you may write"
        ) from error


def _label_names(config: Any) -> list[str]:
    return [str(config.id2label[number]) for number in range(int(config.num_labels))]


def _sources(model: Path) -> dict[str, str]:
    """sha256 of the files that decide what a model directory computes; empty for a hub id."""
    if not model.is_dir():
        return {}
    files = sorted({file for pattern in (*_WEIGHTS, *_FEEDING) for file in model.glob(pattern)})
    return {file.name: sha256_file(file) for file in files}


def copy_preprocessor(base: BaseGraph, folder: Path) -> None:
    """Put the files of the preprocessor of ``base`` into ``folder``."""
    if base.preprocessing.kind == "image":
        return
    for name in TOKENIZER_FILES:
        file = base.folder / name
        if file.is_file():
            shutil.copyfile(file, folder / name)
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise ExportError(f"the base model has no {TOKENIZER_FILES[0]}; save its fast tokenizer beside the weights")
