"""How a base graph names things: what its exporter (with torch) writes and its rewriter (without) reads."""

from __future__ import annotations

import ast

__all__ = ["SCOPES", "TRANSPOSED", "module_path_of"]

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
