"""Find the sites of a graph: which node runs which PyTorch module, and over which axis it contracts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.errors import SiteError
from deployfa.naming import SCOPES, module_path_of

__all__ = ["Site", "Use", "find_sites", "module_path"]

#: How a weight lies in the graph: ``dk`` (out, in) as in PyTorch, ``kd`` transposed, ``conv`` (out, in/groups, …).
Layout = Literal["dk", "kd", "conv"]


@dataclass(frozen=True, eq=False)
class Use:
    """One node that runs a site.  A module called twice (ALBERT's shared layer) has two uses of one weight."""

    node: ir.Node
    weight: ir.Value
    layout: Layout
    bias: ir.Value | None
    bias_node: ir.Node | None
    bias_index: int

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None  # _use refuses a node without an input
        return value

    @property
    def groups(self) -> int:
        return self.node.attributes.get_int("group", 1) if self.layout == "conv" else 1

    @property
    def alpha(self) -> float:
        """Gemm's factor on the product, 1 for every other op."""
        return self.node.attributes.get_float("alpha", 1.0) if self.node.op_type == "Gemm" else 1.0

    @property
    def beta(self) -> float:
        """Gemm's factor on the bias, 1 for every other op."""
        return self.node.attributes.get_float("beta", 1.0) if self.node.op_type == "Gemm" else 1.0

    @property
    def zero_padding(self) -> bool:
        """Whether the convolution pads its input with zeros, which δ must not reach."""
        if self.layout != "conv":
            return False
        pads = self.node.attributes.get_ints("pads", [])
        return any(pads) or self.node.attributes.get_string("auto_pad", "NOTSET") in {"SAME_UPPER", "SAME_LOWER"}

    @property
    def pads_first(self) -> bool:
        """Whether the module pads with zeros in a node of its own (a Conv2d subclass that calls ``F.pad``)."""
        pad = self.input.producer()
        if pad is None or pad.op_type != "Pad" or module_path(pad) != module_path(self.node):
            return False
        return pad.attributes.get_string("mode", "constant") == "constant"


@dataclass(frozen=True, eq=False)
class Site:
    """One adapted layer, named by its module path, and every node that runs it."""

    path: str
    uses: tuple[Use, ...]

    @cached_property
    def weight(self) -> ir.Value:
        return self.uses[0].weight

    @property
    def layout(self) -> Layout:
        return self.uses[0].layout

    @property
    def groups(self) -> int:
        return self.uses[0].groups

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape as it lies in the graph."""
        found = self.weight.shape
        assert found is not None  # _use takes only weights of known rank
        return tuple(int(dim) for dim in found)  # type: ignore[arg-type]

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's kernel, () for a dense layer."""
        return self.shape[2:] if self.layout == "conv" else ()

    @property
    def in_features(self) -> int:
        """k, the axis that the op contracts: never guessed from the shape, a square weight would hide the mistake."""
        return self.shape[0] if self.layout == "kd" else self.shape[1] * self.groups

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.layout == "kd" else self.shape[0]

    def constant_weight(self) -> Array | None:
        """The weight as PyTorch has it, (d, k) or (d, k/groups, *kernel); ``None`` if it is not a constant."""
        tensor = self.weight.const_value
        if tensor is None:
            return None
        array: Array = np.asarray(tensor.numpy())
        return array.T if self.layout == "kd" else array


def module_path(node: ir.Node) -> str | None:
    """The PyTorch module that made ``node``: the last module before the op's own name, ``None`` if not recorded."""
    return module_path_of(node.metadata_props.get(SCOPES))


def find_sites(model: ir.Model) -> dict[str, Site]:
    """Module path → ``Site`` for every MatMul, Gemm and Conv that runs a module with a weight of its own.

    Raises ``SiteError`` if the graph carries no module paths at all.
    """
    uses: dict[str, list[Use]] = {}
    saw_path = False
    for node in model.graph.all_nodes():
        path = module_path(node)
        saw_path |= path is not None
        use = _use(node, path) if path else None
        if path and use is not None:
            uses.setdefault(path, []).append(use)
    if not saw_path:
        raise SiteError("this graph carries no module paths, so no site can be found; export it with deployfa export")
    return {path: Site(path, tuple(found)) for path, found in uses.items() if _is_site(model.graph, found)}


def _is_site(graph: ir.Graph, found: list[Use]) -> bool:
    """Every use reads one weight in one way (a fused attention has two), and none is inside an If or a Loop."""
    first = found[0]
    return all(
        use.weight is first.weight
        and (use.layout, use.groups, use.alpha) == (first.layout, first.groups, first.alpha)
        and use.node.graph is graph
        for use in found
    )


def _use(node: ir.Node, path: str | None) -> Use | None:
    if node.domain not in {"", "ai.onnx"} or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    weight = node.inputs[1]
    if weight is None or not _is_weight(weight):
        return None
    if node.op_type == "MatMul" and weight.shape is not None and len(weight.shape) == 2:
        bias, adder, index = _added_bias(node, path)
        return Use(node, weight, "kd", bias, adder, index)
    if node.op_type == "Gemm" and not node.attributes.get_int("transA", 0):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return Use(node, weight, "dk" if node.attributes.get_int("transB", 0) else "kd", bias, node, 2)
    if node.op_type == "Conv":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return Use(node, weight, "conv", bias, node, 2)
    return None


def _is_weight(value: ir.Value) -> bool:
    """A constant or a graph input of known shape: what a layer's own weight can be."""
    known = value.shape is not None and all(isinstance(dim, int) for dim in value.shape)
    return known and (value.const_value is not None or value.is_graph_input())


def _added_bias(node: ir.Node, path: str | None) -> tuple[ir.Value | None, ir.Node | None, int]:
    """The ``Add`` after a MatMul that belongs to the same module, with its constant operand."""
    consumers = list(node.outputs[0].consumers())
    if len(consumers) != 1 or consumers[0].op_type != "Add" or module_path(consumers[0]) != path:
        return None, None, 1
    for index, operand in enumerate(consumers[0].inputs):
        if operand is not None and operand.const_value is not None and operand.is_initializer():
            return operand, consumers[0], index
    return None, None, 1
