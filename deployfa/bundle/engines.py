"""Engines in a bundle.  An engine is executable code: it leaves here only if the manifest vouches for every byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from deployfa.atomic import write_file
from deployfa.bundle.bundle import Bundle, sha256_file, write_manifest
from deployfa.bundle.manifest import ENGINES
from deployfa.errors import BundleError, InputError, OutputExistsError
from deployfa.runtimes.tensorrt.record import EngineRecord

__all__ = ["ENGINES", "add_engine", "check_engine_place", "engine_of", "read_engine"]


def check_engine_place(bundle: Bundle, name: str, *, force: bool) -> None:
    """Raise ``OutputExistsError``, before long work, if the bundle has this engine and ``force`` is not given."""
    if not force and any(engine.name == name for engine in bundle.manifest.engines):
        raise OutputExistsError(bundle.path / ENGINES / name, instead="")


def add_engine(bundle: Bundle, name: str, build: Callable[[Path], EngineRecord], *, force: bool) -> EngineRecord:
    """Put an engine into ``bundle``: ``build`` writes the file and says what it is, then the manifest names it.

    The file bears its own hash in its name, so the one that it replaces stays whole until the manifest names the new
    one, and is removed after that.  Returns the record with file, size and sha256 filled in.
    """
    check_engine_place(bundle, name, force=force)
    folder = bundle.path / ENGINES
    there = folder.is_dir()
    aside = folder / f"{name}.engine"
    try:
        with write_file(aside, force=True) as partial:
            record = build(partial)
            digest, size = sha256_file(partial), partial.stat().st_size
        final = folder / f"{name}-{digest[:12]}.engine"
        aside.replace(final)
    except BaseException:
        _remove_empty(folder, there)
        raise
    file = f"{ENGINES}/{final.name}"
    record = msgspec.structs.replace(record, file=file, sha256=digest, bytes=size)
    replaced = [engine for engine in bundle.manifest.engines if engine.name == record.name]
    gone = {engine.file for engine in replaced} - {file}
    engines = [engine for engine in bundle.manifest.engines if engine.name != record.name]
    files = {name: known for name, known in bundle.manifest.files.items() if name not in gone}
    manifest = msgspec.structs.replace(
        bundle.manifest,
        engines=sorted([*engines, record], key=lambda engine: engine.name),
        files=dict(sorted({**files, file: digest}.items())),
    )
    try:
        write_manifest(bundle.path, manifest)
    except BaseException:
        if file not in bundle.manifest.files:
            final.unlink(missing_ok=True)
        _remove_empty(folder, there)
        raise
    bundle.manifest = manifest
    for name in gone:
        (bundle.path / name).unlink(missing_ok=True)
    return record


def _remove_empty(folder: Path, there: bool) -> None:
    """The folder that was made for an engine, ``there`` before or not, when nothing came of it."""
    if not there and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def engine_of(bundle: Bundle, target: str, name: str | None = None) -> EngineRecord:
    """The engine of ``bundle`` for ``target``; ``name`` where there are several.

    Raises ``InputError`` and says what to type if there is none, or more than one.
    """
    fitting = [engine for engine in bundle.manifest.engines if engine.target == target]
    if name is not None:
        fitting = [engine for engine in fitting if engine.name == name]
    if not fitting:
        others = ", ".join(engine.name for engine in bundle.manifest.engines) or "none"
        raise InputError(
            f"'{bundle.path}' has no engine {name or f'for {target}'} (engines: {others}); "
            f"build one: deployfa compile {bundle.path} --target {target}"
        )
    if len(fitting) > 1:
        raise InputError(
            f"'{bundle.path}' has {len(fitting)} engines for {target}; "
            f"pass --engine with one of: {', '.join(engine.name for engine in fitting)}"
        )
    return fitting[0]


def read_engine(bundle: Bundle, engine: EngineRecord) -> bytes:
    """The bytes of ``engine``, compared with the manifest's sha256 as they will be loaded.

    Raises ``BundleError``, with the command that builds it again, if they are not those that were built.
    """
    path = (bundle.path / engine.file).resolve()
    if not path.is_relative_to(bundle.path.resolve()):
        raise BundleError(f"'{bundle.path}': engine '{engine.file}' lies outside the bundle; refused")
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != engine.sha256:
        what = "is not the engine that was built (sha256 differs)" if content else "is missing"
        raise BundleError(f"'{bundle.path}/{engine.file}' {what} and is not loaded; build it again: {engine.command}")
    return content
