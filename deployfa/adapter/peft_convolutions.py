"""Convolutions in a PEFT checkpoint: what PEFT's tensors say of them and an edit does not.

An edit's λ is (k,) and LoRA's B is (d, r), whatever the layer; PEFT gives them the axes of the kernel, and B of a
grouped convolution reads only r/groups columns.  So that a checkpoint can be written again, the adapter's config keeps
``convolutions``: {site: [axes of the kernel, groups]}.  The key is ours and not written into ``adapter_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deployfa.edits import Array
from deployfa.errors import EditError

__all__ = ["CONVOLUTIONS", "convolution_of", "convolutions", "grouped", "ungrouped"]

CONVOLUTIONS = "convolutions"


def convolutions(tensors: Mapping[str, Array]) -> dict[str, dict[str, list[int]]]:
    """The entry for the config, empty if no tensor is a convolution's.  tensors: ``SITE.NAME`` → array."""
    found: dict[str, list[int]] = {}
    for name, array in tensors.items():
        if array.ndim < 3:
            continue
        if name.endswith(".ia3_l"):
            found[name.removesuffix(".ia3_l")] = [array.ndim - 2, 1]
        elif name.endswith(".lora_B.weight"):
            site = name.removesuffix(".lora_B.weight")
            a = tensors.get(f"{site}.lora_A.weight", array)
            found[site] = [array.ndim - 2, max(1, len(a) // max(1, array.shape[1]))]
    return {CONVOLUTIONS: found} if found else {}


def convolution_of(site: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """(axes of the kernel, groups) of ``site``; (0, 1) for a dense layer.  Raises ``EditError`` on a broken entry."""
    entries = config.get(CONVOLUTIONS) or {}
    entry = entries.get(site, [0, 1]) if isinstance(entries, Mapping) else None
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(n, int) and n >= 0 for n in entry):
        raise EditError(f"site '{site}': the adapter's config has broken {CONVOLUTIONS}; copy the adapter again")
    return entry[0], max(1, entry[1])


def ungrouped(b: Array, rank: int) -> Array:
    """B of a grouped convolution, (d, r/groups), as the (d, r) that it is: zero where it does not read."""
    d, columns = b.shape
    groups = rank // columns if columns and rank % columns == 0 else 1
    if groups == 1 or d % groups:
        return b
    whole = np.zeros((d, rank), dtype=b.dtype)
    for group, rows in enumerate(np.split(np.arange(d), groups)):
        whole[rows, group * columns : (group + 1) * columns] = b[rows]
    return whole


def grouped(site: str, b: Array, axes: int, groups: int) -> Array:
    """(d, r) → PEFT's (d, r/groups, 1, …), the inverse of ``ungrouped``.

    Raises ``EditError`` if B reads across the groups, which PEFT's B cannot.
    """
    d, rank = b.shape
    if d % groups or rank % groups:
        raise EditError(f"site '{site}': B {b.shape} does not divide into {groups} groups; save as .safetensors")
    columns = rank // groups
    parts = [rows[:, i * columns : (i + 1) * columns] for i, rows in enumerate(np.split(b, groups))]
    narrow: Array = np.concatenate(parts)
    if not np.array_equal(ungrouped(narrow, rank), b):
        raise EditError(f"site '{site}': B reads across the {groups} groups of the convolution; save as .safetensors")
    return narrow.reshape(d, columns, *([1] * axes))
