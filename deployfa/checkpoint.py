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
    found: dict[str, Callable[[], Array]] = {}
    for file in files:
        with _open(file) as (names, _):
            named = {site: _named(site, names) for site in sites}
        found |= {site: partial(_read, file, name) for site, name in named.items() if name is not None}
    return found


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


def _named(site: str, names: Collection[str]) -> str | None:
    """The parameter of ``site``: a checkpoint of the whole model names it as the adapter does, one of the encoder alone
    leaves the first part out, one of a larger model puts one before."""
    exact = f"{site}.weight"
    ends = [name for name in names if name == exact or exact.endswith(f".{name}") or name.endswith(f".{exact}")]
    return max(ends, key=lambda name: (name == exact, len(name)), default=None)
