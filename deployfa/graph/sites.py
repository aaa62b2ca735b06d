"""Find the sites of a graph: which nodes run which PyTorch module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from deployfa.edits import Array
from deployfa.errors import SiteError
from deployfa.graph.layers import LAYERS, Use, layers, module_path
from deployfa.graph.weights import Layout, Weight, canonical
from deployfa.naming import TRANSPOSED

__all__ = ["Site", "find_sites", "module_path"]


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted layer, named by its module path, and every node that runs it."""

    path: str
    uses: tuple[Use, ...]

    @cached_property
    def weight(self) -> Weight:
        return self.uses[0].weight

    @property
    def layout(self) -> Layout:
        return self.uses[0].layout

    @property
    def groups(self) -> int:
        return self.uses[0].groups

    @property
    def convolves(self) -> bool:
        return self.uses[0].convolves

    @property
    def nodes(self) -> list[ir.Node]:
        return [use.node for use in self.uses]

    @property
    def op(self) -> str:
        """The operator that runs the layer."""
        return self.uses[0].node.op_type

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape as the layer reads it."""
        return self.weight.shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's kernel, () for a dense layer."""
        return self.shape[2:] if self.convolves else ()

    @property
    def experts(self) -> tuple[int, ...]:
        """The leading axes of a weight that holds many matrices (a mixture of experts), () for one."""
        return () if self.convolves else self.shape[:-2]

    @property
    def in_features(self) -> int:
        """k, the axis that the op contracts: never guessed from the shape, a square weight would hide the mistake."""
        return self.uses[0].features("in")

    @property
    def out_features(self) -> int:
        return self.uses[0].features("out")

    def constant_weight(self) -> Array | None:
        """The weight as PyTorch has it, (…, d, k) or (d, k/groups, *kernel), dequantised if it is quantised; ``None``
        if it is not stored in the graph."""
        return canonical(self.weight.numbers(), self.layout, self.groups) if self.weight.is_constant else None


def find_sites(model: ir.Model) -> dict[str, Site]:
    """Module path → ``Site`` for every layer of a module with a weight of its own.

    A module that holds several weights (a mixture of experts, ``nn.MultiheadAttention``) has one site for each, named
    by the parameter.  Raises ``SiteError`` if the graph carries no module paths at all.
    """
    if not any(module_path(node) for node in model.graph.all_nodes()):
        raise SiteError(
            "this graph carries no module paths, so no site can be found; export it with deployfa export, or place the "
            "adapter with deployfa apply"
        )
    uses: dict[str, list[Use]] = {}
    for use in layers(model.graph):
        path = module_path(use.node)
        if path:
            uses.setdefault(path, []).append(use)
    inside = _inside_subgraphs(model)
    sites: dict[str, Site] = {}
    for path, found in uses.items():
        if path in inside:
            continue
        if _is_one_weight(found):
            sites[path] = Site(path, tuple(found))
        else:
            sites |= _by_parameter(path, found)
    return sites


def _is_one_weight(found: Iterable[Use]) -> bool:
    """Whether every use reads one weight in one way (a fused attention has two weights)."""
    first, *rest = found
    return all(use.reads_as(first) for use in rest)


def _by_parameter(path: str, found: Iterable[Use]) -> dict[str, Site]:
    """The layers of one module by the names of their parameters: ``mlp.experts.down_proj``."""
    groups: dict[str, list[Use]] = {}
    for use in found:
        name = use.weight.name.removesuffix(TRANSPOSED)
        if name.startswith(f"{path}."):
            groups.setdefault(name, []).append(use)
    return {name: Site(name, tuple(uses)) for name, uses in groups.items() if _is_one_weight(uses)}


def _inside_subgraphs(model: ir.Model) -> set[str]:
    """Modules that also run inside an If or a Loop, where an edit cannot follow them."""
    return {
        path
        for node in model.graph.all_nodes()
        if node.graph is not model.graph and node.op_type in LAYERS and (path := module_path(node))
    }
