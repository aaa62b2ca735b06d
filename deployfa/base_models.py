"""Base models by name: directories that ``from_pretrained`` loads, fetched, and converted where the index has another
format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from filelock import FileLock

from deployfa.assets import ASSETS, cache_errors, fetch
from deployfa.atomic import write_directory
from deployfa.cache import cache_dir
from deployfa.errors import InputError, MissingExtraError

__all__ = ["BASE_MODELS", "Converted", "base_model"]


@dataclass(frozen=True)
class Converted:
    """A model that is made from ``asset`` by ``function``, ``module:name`` of ``(asset folder, out folder)``.

    ``revision`` is raised when the function writes something else, so that older copies are made again.
    """

    asset: str
    function: str
    revision: int = 1


#: Name → how it is had; ``None`` where the asset is the directory.
BASE_MODELS: dict[str, Converted | None] = {
    "efficientnet-lite0": Converted(
        "efficientnet-lite0", "deployfa.training.efficientnet_lite_files:convert_efficientnet_lite0"
    ),
    "minilm": None,
    "smollm2": Converted("smollm2-gguf", "deployfa.training.gguf:convert_smollm2"),
}


def base_model(name: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """The directory of base model ``name``, a key of ``BASE_MODELS``; made on first use, kept in the cache.

    Raises ``InputError`` for an unknown name, ``StorageError`` when the cache cannot be written, what
    ``deployfa.assets.fetch`` raises, and ``MissingExtraError`` without PyTorch if the model must be converted.
    """
    if name not in BASE_MODELS:
        raise InputError(f"no base model is called '{name}'; known: {', '.join(sorted(BASE_MODELS))}")
    converted = BASE_MODELS[name]
    if converted is None:
        return fetch(name, progress=progress)
    version = ASSETS[converted.asset].version
    target = cache_dir() / "models" / f"{name}-{version}.{converted.revision}"
    if target.is_dir():
        return target
    source = fetch(converted.asset, progress=progress)
    if progress:
        progress(f"converting {name} (once)")
    module, _, function = converted.function.partition(":")
    try:
        convert: Callable[[Path, Path], None] = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train", f"converting {name}") from error
    with cache_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if not target.is_dir():
                with write_directory(target) as partial:
                    convert(source, partial)
    return target
