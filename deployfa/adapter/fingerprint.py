"""The identity of a base model: sha256 over its state dict, whatever the order of its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["fingerprint"]


def fingerprint(tensors: Iterable[tuple[str, str, tuple[int, ...], bytes | memoryview]]) -> str:
    """``"sha256:…"`` over (name, dtype, shape, little-endian bytes) of every tensor.

    Each tensor is hashed alone, the sorted list of ``name → hash`` is hashed after: the order in which a framework
    keeps its tensors does not matter, and one flipped bit, one renamed or one missing tensor does.
    """
    lines = []
    for name, dtype, shape, data in tensors:
        digest = hashlib.sha256(data).hexdigest()
        # a newline in a name must not look like the next tensor's line
        plain = name.encode("unicode_escape").decode()
        lines.append(f"{plain} {dtype} {'x'.join(map(str, shape))} {digest}\n")
    return "sha256:" + hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
