"""Which nodes are calls of one module, in a graph that says so only in the names of its nodes.

One stored weight may be two modules' (exporters merge equal initializers), and one module may be called several times.
The legacy exporter of PyTorch numbers the calls: ``/b/fc/MatMul``, ``/b/fc_1/MatMul``, ``/b_1/fc_2/MatMul``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from deployfa.errors import SiteError
from deployfa.graph.layers import Use
from deployfa.naming import same_path

__all__ = ["calls_of", "modules", "scope_of"]


def scope_of(use: Use) -> str:
    """``/encoder/layer.0/dense/MatMul`` → ``encoder.layer.0.dense``: the module's part of a node's name."""
    name = use.node.name or ""
    if "/" not in name:
        return ""
    parts = [part for part in name.split("/") if part]
    return re.sub(r"\.+", ".", ".".join(parts[:-1]))


def modules(every: Sequence[Use]) -> dict[ir.Node, str]:
    """Node of a layer → the scope of its module's first call; only layers whose nodes have a scope."""
    scopes = {use.node: scope_of(use) for use in every if scope_of(use)}
    by_depth: dict[int, list[str]] = {}
    for scope in sorted(set(scopes.values()), key=len):
        by_depth.setdefault(scope.count("."), []).append(scope)
    # a first call has no count, so ``fc_1`` and ``fc_2`` where there is no ``fc`` are two modules
    first = {
        scope: next(known for known in alike if _is_call(scope, known))
        for alike in by_depth.values()
        for scope in alike
    }
    return {node: first[scope] for node, scope in scopes.items()}


def calls_of(site: str, found: Sequence[Use], every: Sequence[Use], module: Mapping[ir.Node, str]) -> list[Use]:
    """All calls of the module that ``found``, uses of one stored weight, belong to, and no other's; ``every``: the
    layers of the graph, ``module``: what ``modules`` says of them.

    Where the names of the nodes say nothing, or agree, that is ``found`` and the further calls.  Raises ``SiteError``
    where they disagree and none is the site's, or where the calls have a copy of the weight each.
    """
    scopes = {module[use.node] for use in found if use.node in module}
    if not scopes:
        return list(found)
    ours = scopes if len(scopes) == 1 else set(same_path(site, scopes))
    if len(ours) != 1:
        shown = ", ".join(sorted(scopes))
        raise SiteError(
            f"site '{site}' has the weight of several modules: {shown}; name the weight or a node in --sites"
        )
    (scope,) = ours
    stored = found[0].weight.stored
    same = [use for use in every if module.get(use.node) == scope]
    copies = [use for use in same if use.weight.stored is not stored and _equal(use, found[0])]
    if copies and same_path(site, {scope}):
        names = ", ".join(use.weight.name for use in (found[0], *copies[:3]))
        raise SiteError(
            f"site '{site}' runs several times, each with its own copy of one weight ({names}); export the base graph "
            "with deployfa export"
        )
    calls = [use for use in same if use.weight.stored is stored]
    # a node without a scope is no evidence against what was found, where nothing else is
    return calls + [use for use in found if use.node not in module and len(scopes) == 1]


def _is_call(scope: str, first: str) -> bool:
    """Whether ``b_1.fc_2`` is a later call of ``b.fc``, or the same."""
    pairs = zip(scope.split("."), first.split("."), strict=True)
    return all(
        part == name or (part.startswith(f"{name}_") and part[len(name) + 1 :].isdigit()) for part, name in pairs
    )


def _equal(use: Use, other: Use) -> bool:
    if not (use.weight.is_constant and other.weight.is_constant) or use.weight.shape != other.weight.shape:
        return False
    return use.layout == other.layout and np.array_equal(use.weight.numbers(), other.weight.numbers())
