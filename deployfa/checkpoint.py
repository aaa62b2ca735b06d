"""The weights of a model directory, one tensor at a time and without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it)
import safetensors

from deployfa.adapter.torch_zip import read_torch_zip
from deployfa.edits import Array
from deployfa.errors import InputError
from deployfa.naming import same_path

__all__ = ["weights_of"]


def weights_of(folder: Path, sites: Collection[str]) -> dict[str, Callable[[], Array]]:
    """``{site: a function that reads its weight}`` for the sites that the checkpoint in ``folder`` has, whatever prefix
    its names carry.

    Reads ``*.safetensors`` (whole or in shards), else ``*.bin``.  Raises ``InputError`` if there is no checkpoint.
    """
    if not folder.is_dir():
        raise InputError(f"no model at '{folder}'; pass its directory with --model")
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise InputError(f"'{folder}' holds no *.safetensors and no *.bin; pass a model directory with --model")
    owners: dict[str, Path] = {}
    for file in files:
        with _open(file) as (names, _):
            owners |= dict.fromkeys(names, file)
    named = {site: same_path(f"{site}.weight", owners) for site in sites}
    return {site: partial(_read, owners[names[0]], names[0]) for site, names in named.items() if len(names) == 1}


def _read(file: Path, name: str) -> Array:
    with _open(file) as (_, read):
        return read(name)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[tuple[list[str], Callable[[str], Array]]]:
    """Names of the tensors in ``file``, and how to read one."""
    if file.suffix == ".bin":
        state = read_torch_zip(file)
        if not isinstance(state, dict):
            raise InputError(f"'{file}' holds no state dict; pass a model directory with --model")
        yield [str(name) for name in state], state.__getitem__
        return
    try:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            yield list(tensors.keys()), tensors.get_tensor
    except safetensors.SafetensorError as error:
        raise InputError(f"'{file}' is not a whole safetensors file ({error}); copy it again") from error
