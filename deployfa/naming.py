"""How a base graph names things: what its exporter (with torch) writes and its rewriter (without) reads."""

from __future__ import annotations

import ast
from collections.abc import Collection

__all__ = ["SCOPES", "TRANSPOSED", "module_path_of", "same_path"]

#: Node metadata of torch's exporter: the list of module paths around a node, the op's own name last.
SCOPES = "pkg.torch.onnx.name_scopes"
#: Suffix of a weight that the exporter transposed: ``encoder.dense.weight.T``.
TRANSPOSED = ".T"


def module_path_of(scopes: str | None) -> str | None:
    """The last module before the op's own name; ``None`` if ``scopes`` is absent or not such a list."""
    if scopes is None:
        return None
    try:
        parts = ast.literal_eval(scopes)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        # all that literal_eval documents for a text it cannot take
        return None
    return str(parts[-2]) if isinstance(parts, list) and len(parts) >= 2 else None


def same_path(path: str, names: Collection[str]) -> list[str]:
    """Those of ``names`` that are ``path`` but for what a wrapper puts in front of it (``bert.``, ``0.auto_model.``).

    ``path`` itself if it is there; else all that have more in front, which may be several; else the longest that has
    less.  A name that lacks a number of ``path`` is another layer's: ``dense`` is not ``layer.0.output.dense``.
    """
    if path in names:
        return [path]
    longer = sorted(name for name in names if name.endswith(f".{path}"))
    if longer:
        return longer
    shorter = [name for name in names if path.endswith(f".{name}") and _wraps(path.removesuffix(name))]
    return [max(shorter, key=len)] if shorter else []


def _wraps(front: str) -> bool:
    """Whether ``front`` can be a wrapper's: ``nn.Sequential`` puts a number first, a stack of layers further on."""
    return not any(part.isdigit() for part in front.split(".")[1:])
