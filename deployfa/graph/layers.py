"""Recognise the nodes that compute ``y = W x + c`` from a stored W, whatever form W has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from deployfa.graph.integer_layers import Dynamic, blocks_weight, dynamic_product, integer_operands
from deployfa.graph.views import constant
from deployfa.graph.weights import Layout, Weight, read_weight
from deployfa.naming import SCOPES, module_path_of

__all__ = ["LAYERS", "Axis", "Use", "layers", "module_path", "read_layer"]

#: The features that go into a layer (k), or those that come out of it (d).
Axis = Literal["in", "out"]
#: The operators that can run one.
LAYERS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "MatMulNBits"),
        *("QGemm", "QLinearConv", "QLinearMatMul"),
    }
)
_CONV: dict[str, Layout] = {"Conv": "conv", "ConvTranspose": "conv transpose", "QLinearConv": "conv"}


@dataclass(frozen=True, eq=False)
class Use:
    """One node that runs a layer.  A module called twice (ALBERT's shared layer) has two uses of one weight.

    ``product``: the floating-point ``W x``, with the bias if the node itself adds it.  ``bias_value``: what is added,
    ``bias``: the same as a stored vector, ``None`` if it is computed.  ``dynamic``: how x is quantised at run time.
    ``integer``: the node reads x as integers and answers integers.
    """

    node: ir.Node
    weight: Weight
    layout: Layout
    product: ir.Value
    bias_value: ir.Value | None = None
    bias_node: ir.Node | None = None
    bias_index: int = 2
    dynamic: Dynamic | None = None
    integer: bool = False

    @property
    def bias(self) -> Weight | None:
        return read_weight(self.bias_value)

    @property
    def input(self) -> ir.Value:
        """x, before it is quantised at run time."""
        value = self.dynamic.quantizer.inputs[0] if self.dynamic is not None else self.node.inputs[0]
        assert value is not None  # read_layer refuses a node without an input
        return value

    @property
    def output(self) -> ir.Value:
        """``W x + c``."""
        added = self.bias_node is not None and self.bias_node is not self.node
        return self.bias_node.outputs[0] if added and self.bias_node is not None else self.product

    @property
    def reads(self) -> list[tuple[ir.Node, int]]:
        """Every (node, input index) through which this use, and nothing else, reads x."""
        return [(self.node, 0)] if self.dynamic is None else [(node, index) for node, index, _ in self.dynamic.reads]

    @property
    def convolves(self) -> bool:
        return self.layout in {"conv", "conv transpose"}

    @property
    def groups(self) -> int:
        return self.node.attributes.get_int("group", 1) if self.convolves else 1

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
        if not self.convolves:
            return False
        pads = self.node.attributes.get_ints("pads", [])
        return any(pads) or self.node.attributes.get_string("auto_pad", "NOTSET") in {"SAME_UPPER", "SAME_LOWER"}

    @property
    def pads_first(self) -> bool:
        """Whether the module pads with zeros in a node of its own (a Conv2d subclass that calls ``F.pad``, or holds a
        module that pads)."""
        pad = self.input.producer()
        inside = f"{module_path(pad) if pad is not None else ''}.".startswith(f"{module_path(self.node)}.")
        if pad is None or pad.op_type != "Pad" or not inside:
            return False
        return pad.attributes.get_string("mode", "constant") == "constant"

    def reads_as(self, other: Use) -> bool:
        """Whether both make one matrix of one stored weight: not so where one transposes it, and it is square."""
        mine, its = self.weight, other.weight
        return (
            mine.stored is its.stored
            and (mine.shape, mine.moves) == (its.shape, its.moves)
            and (self.layout, self.groups, self.alpha) == (other.layout, other.groups, other.alpha)
        )

    def axis(self, which: Axis) -> int:
        """The axis of the weight's operand along which the features of ``which`` lie (a convolution's per group)."""
        order = {"kd": (-2, -1), "dk": (-1, -2), "conv": (1, 0), "conv transpose": (0, 1)}[self.layout]
        return order[which == "out"] % len(self.weight.shape)

    def features(self, which: Axis) -> int:
        """k or d."""
        found = self.weight.shape[self.axis(which)]
        per_group = "in" if self.layout == "conv" else "out"
        return found * self.groups if which == per_group else found


def module_path(node: ir.Node) -> str | None:
    """The PyTorch module that made ``node``: the last module before the op's own name, ``None`` if not recorded."""
    return module_path_of(node.metadata_props.get(SCOPES))


def layers(graph: ir.Graph) -> list[Use]:
    """Every layer of ``graph``, in its order; those inside an If or a Loop are left out."""
    return [use for node in graph if (use := read_layer(node)) is not None]


def read_layer(node: ir.Node) -> Use | None:
    """``node`` as a layer; ``None`` if it is none, or its weight is computed from anything but stored numbers."""
    if len(node.inputs) < 2 or node.inputs[0] is None or not node.outputs:
        return None
    if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
        packed = blocks_weight(node)
        if packed is None:
            return None
        if len(node.inputs) > 5 and node.inputs[5] is not None:
            return Use(node, packed, "dk", node.outputs[0], node.inputs[5], node, 5)
        return _dense(node, packed, "dk", node.outputs[0])
    if node.op_type in {"QLinearMatMul", "QGemm", "QLinearConv"}:
        return _integers(node)
    if node.domain not in {"", "ai.onnx"}:
        return None
    if node.op_type == "MatMulInteger":
        product = dynamic_product(node)
        return _dense(node, product.weight, "kd", product.result, product.dynamic) if product is not None else None
    if node.op_type not in {"MatMul", "Gemm", *_CONV}:
        return None
    weight = read_weight(node.inputs[1])
    if weight is None or len(weight.shape) < 2:
        return None
    if node.op_type == "MatMul":
        return _dense(node, weight, "kd", node.outputs[0])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0) != 0:
            return None
        layout: Layout = "dk" if node.attributes.get_int("transB", 0) != 0 else "kd"
        return Use(node, weight, layout, node.outputs[0], bias, node, 2)
    return Use(node, weight, _CONV[node.op_type], node.outputs[0], bias, node, 2)


def _integers(node: ir.Node) -> Use | None:
    """QLinearMatMul, QGemm, QLinearConv: integers in, integers out."""
    weight = integer_operands(node)
    if weight is None:
        return None
    layout = _CONV.get(node.op_type) or ("dk" if node.attributes.get_int("transB", 0) != 0 else "kd")
    return Use(node, weight, layout, node.outputs[0], integer=True)


def _dense(
    node: ir.Node, weight: Weight, layout: Layout, product: ir.Value, dynamic: Dynamic | None = None
) -> Use | None:
    """A product whose bias is the ``Add`` after it."""
    if len(weight.shape) < 2:
        return None
    d = weight.shape[-1] if layout == "kd" else weight.shape[-2]
    bias, adder, index = _added_bias(product, module_path(node), d)
    return Use(node, weight, layout, product, bias, adder, index, dynamic)


def _added_bias(product: ir.Value, path: str | None, d: int) -> tuple[ir.Value | None, ir.Node | None, int]:
    """The ``Add`` of a stored operand to ``product``: by the same module, or of one number for each output."""
    readers = list(product.uses())
    if len(readers) != 1 or readers[0].node.op_type != "Add" or product.is_graph_output():
        return None, None, 1
    adder, other = readers[0].node, 1 - readers[0].idx
    operand = adder.inputs[other]
    if operand is None or operand is product:
        return None, None, 1
    adders_path = module_path(adder)
    if path is not None and adders_path is not None and path != adders_path:
        return None, None, 1
    if path is None or adders_path is None:
        # nothing says whose Add it is: a vector of d numbers is a bias, a table of positions is not
        weight = read_weight(operand)
        if weight is None or weight.is_input or weight.shape[-1:] != (d,) or max(weight.shape[:-1], default=1) != 1:
            return None, None, 1
    elif constant(operand) is None and (read_weight(operand) is None):
        return None, None, 1
    return operand, adder, other
