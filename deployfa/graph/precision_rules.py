"""Which nodes of a graph stay in float32, and why.

1. What the operator is: norms, softmaxes, reductions, powers and exponentials, generators.
2. What it reads: a stored number that the lower type cannot hold (a mask's -3.4e38, an ε of 1e-12), or a value that may
   be as large as one; a scale of a quantiser below the type's normal range; an integer accumulator.
3. What it belongs to: a norm in pieces; the additions and masks between a layer and its softmax, which a runtime
   computes in one go; positions on their way to a sine (float16 counts to 2048).
4. Nodes that only move numbers follow what they move: low as soon as that is low or is wanted low only.
"""

from __future__ import annotations

from typing import Final, Literal

import onnx_ir as ir

from deployfa.graph.precision_norms import REDUCTIONS, decomposed_norms
from deployfa.graph.precision_numbers import Fault, judge, judge_scale, stored
from deployfa.graph.precision_types import FLOAT, Slots, is_float
from deployfa.graph.views import read

__all__ = ["IGNORED", "Reasons", "is_control"]

_SUM: Final = "a sum of many numbers"
_REASONS: Final[dict[str, frozenset[str]]] = {
    "a norm": frozenset(
        {
            *("BatchNormalization", "EmbedLayerNormalization", "GroupNorm", "GroupNormalization"),
            *("InstanceNormalization", "LayerNormalization", "LpNormalization", "LRN", "MeanVarianceNormalization"),
            *("RMSNormalization", "SimplifiedLayerNormalization", "SkipGroupNorm", "SkipLayerNormalization"),
            "SkipSimplifiedLayerNormalization",
        }
    ),
    "a softmax": frozenset({"LogSoftmax", "Softmax"}),
    _SUM: REDUCTIONS | {"CumProd", "CumSum"},
    "a power or an exponential": frozenset({"Cosh", "Exp", "Log", "Pow", "Sinh", "Softplus"}),
    "an angle": frozenset({"Cos", "Sin", "Tan"}),
    "makes numbers": frozenset(
        {"Bernoulli", "EyeLike", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
        | {"RandomUniformLike", "Range"}
    ),
}
_BY_OPERATOR = {op_type: reason for reason, operators in _REASONS.items() for op_type in operators}
#: What picks among numbers and changes none.
_MOVES: Final = frozenset(
    {
        *("Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements"),
        *("GatherND", "GlobalMaxPool", "Identity", "MaxPool", "Pad", "ReduceMax", "ReduceMin", "Reshape"),
        *("ReverseSequence", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile"),
        *("TopK", "Transpose", "Trilu", "Unsqueeze", "Where"),
    }
)
_ELEMENTWISE = frozenset({"Abs", "Add", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Sub", "Sum"})
#: Layers of stored weights, and what answers in a small range whatever it reads: no longer a position or a mask.
_ENDS = frozenset(
    {
        *("Conv", "ConvTranspose", "Cos", "GRU", "Gemm", "LSTM", "LogSoftmax", "RNN", "Sigmoid", "Sin", "Softmax"),
        "Tanh",
    }
)
_SOFTMAXES = frozenset({"Exp", "LogSoftmax", "ReduceLogSumExp", "Softmax"})
_QUANTISERS = frozenset({"DequantizeLinear", "QuantizeLinear"})
_INTEGER_PRODUCTS = frozenset({"ConvInteger", "MatMulInteger"})
#: These take any type and keep what they make.
IGNORED: Final = frozenset({"Cast", "CastLike", "Constant", "Shape", "Size"})
_Origin = Literal["integer", "features", "stored"]
_INTEGER: Final = "integer"
_FEATURES: Final = "features"
_STORED: Final = "stored"


def is_control(node: ir.Node) -> bool:
    """Whether ``node`` has graphs of its own, or sequences: its inputs and outputs keep their types."""
    inside = any(a.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS} for a in node.attributes.values())
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.type is not None]
    return inside or any(not isinstance(value.type, ir.TensorType) for value in values)


class Reasons:
    """``kept``: float node → why it stays in float32.  ``low``: the float nodes that do not, in order.

    nodes: of a graph and all in it, each after those that it reads.  opsets: domain → version.  low: the lower type.
    forced: operators that do not stay, whatever they are.
    """

    def __init__(self, nodes: list[ir.Node], opsets: dict[str, int], low: ir.DataType, forced: frozenset[str]) -> None:
        self._type, self._forced = low, forced
        self._judged: dict[ir.Value, Fault | None] = {}
        self._origins: dict[ir.Value, _Origin] = {}
        self._nodes = [node for node in nodes if _touches_floats(node)]
        self.slots = {node: Slots.of(node, opsets, low) for node in self._nodes if not is_control(node)}
        self._floats = [node for node in self.slots if node.op_type not in IGNORED]
        for node in nodes:
            self._find_origin(node)
        self.kept: dict[ir.Node, str] = {}
        self._by_operator(opsets)
        self._by_constants()
        self._norms()
        self._softmaxes()
        self._positions()
        self._moves()
        self.low = [node for node in self._floats if node not in self.kept]

    def _keep(self, node: ir.Node, reason: str) -> None:
        if node.op_type not in self._forced or self.slots.get(node) is None:
            self.kept.setdefault(node, reason)

    def _is_constant(self, value: ir.Value) -> bool:
        return self._origins.get(value) == _STORED or stored(value) is not None

    def _find_origin(self, node: ir.Node) -> None:
        """What the numbers that ``node`` makes come from: integers, features, or stored numbers alone."""
        values = [value for value in node.inputs if value is not None]
        stored = all(self._is_constant(value) for value in values) and not is_control(node)
        floats = {self._origin(v) for v in values if v.dtype is not None and v.dtype.is_floating_point()}
        origin: _Origin = _FEATURES
        if (stored and _BY_OPERATOR.get(node.op_type) != "makes numbers") or node.op_type == "ConstantOfShape":
            origin = _STORED
        elif _FEATURES in floats or is_control(node) or node.op_type in _ENDS or _is_layer(node):
            origin = _FEATURES
        elif node.op_type == "Cast" and not floats:
            maker = values[0].producer()
            product = maker is not None and maker.op_type in _INTEGER_PRODUCTS
            origin = _FEATURES if product else _INTEGER
        elif node.op_type == "Range" or _INTEGER in floats or node.op_type == "Where":
            origin = _INTEGER
        for output in node.outputs:
            self._origins[output] = origin

    def _origin(self, value: ir.Value) -> _Origin:
        return _STORED if self._is_constant(value) else self._origins.get(value, _FEATURES)

    def _by_operator(self, opsets: dict[str, int]) -> None:
        name = self._type.name.lower()
        for node in self._floats:
            if self.slots[node] is None:
                domain = node.domain or "ai.onnx"
                version = opsets.get(node.domain, opsets.get("ai.onnx", 0))
                self.kept[node] = f"no {name} form is known of it in {domain} {version}"
            elif node.op_type in _BY_OPERATOR:
                self._keep(node, _BY_OPERATOR[node.op_type])
            elif node.attributes.get_string("reduction", "none") not in {"none", "max", "min"}:
                # a scatter that adds up what arrives at one place
                self._keep(node, _SUM)

    def _by_constants(self) -> None:
        name = self._type.name.lower()
        far: set[ir.Value] = set()
        for node in self._floats:
            slots = self.slots[node]
            if slots is None:
                continue
            faults = {self._fault(node, index) for index in slots.inputs} | {self._attribute_fault(node)}
            if "large" in faults:
                self._keep(node, f"a number beyond {name}'s range")
            elif "small" in faults:
                self._keep(node, f"a number below {name}'s range")
            elif any(_is_accumulator(value) for value in node.inputs):
                self._keep(node, "reads an integer accumulator")
            elif any(
                v in far and (node.op_type in _ELEMENTWISE | _MOVES or self._is_constant(v)) for v in node.inputs if v
            ):
                self._keep(node, f"a number beyond {name}'s range")
            if self.kept.get(node) == f"a number beyond {name}'s range" and node.op_type in _ELEMENTWISE | _MOVES:
                far.update(node.outputs)

    def _fault(self, node: ir.Node, index: int) -> Fault | None:
        value = node.inputs[index]
        tensor = stored(value)
        if value is None or tensor is None:
            return None
        if value not in self._judged:
            self._judged[value] = judge(read(tensor), self._type)
        if self._judged[value] is None and node.op_type in _QUANTISERS and index == 1:
            return judge_scale(read(tensor), self._type)
        return self._judged[value]

    def _attribute_fault(self, node: ir.Node) -> Fault | None:
        if node.op_type != "ConstantOfShape" or "value" not in node.attributes:
            return None
        return judge(node.attributes["value"].as_tensor().numpy(), self._type)

    def _norms(self) -> None:
        for node in decomposed_norms(self._floats, self._is_constant):
            if node in self.slots:
                self._keep(node, "part of a norm")

    def _softmaxes(self) -> None:
        """What is added to scores and masked on their way into a softmax, read by nothing else."""
        for node in reversed(self._floats):
            readers = [reader for output in node.outputs for reader in output.consumers()]
            answered = any(output.is_graph_output() for output in node.outputs)
            goes = bool(readers) and all(
                reader in self.kept and (reader.op_type in _SOFTMAXES or self.kept[reader] == _BEFORE_SOFTMAX)
                for reader in readers
            )
            if goes and not answered and node.op_type in _ELEMENTWISE | _MOVES and self.slots[node] is not None:
                self._keep(node, _BEFORE_SOFTMAX)

    def _positions(self) -> None:
        """What is computed from integers and read as float32: positions, buckets, masks."""
        for node in reversed(self._nodes):
            if node not in self.slots or all(self._origins[output] != _INTEGER for output in node.outputs):
                continue
            if node.op_type not in IGNORED and any(self._wanted_whole(output) for output in node.outputs):
                self._keep(node, "computed from integers")

    def _wanted_whole(self, value: ir.Value) -> bool:
        if value.is_graph_output():
            return True
        return any(
            reader in self.kept
            or is_control(reader)
            or not (_makes_floats(reader) or reader.op_type in {"Shape", "Size"})
            for reader in value.consumers()
        )

    def _moves(self) -> None:
        """Follow what is moved, see the module's fourth rule; what only reads floats follows what it reads."""
        flexible = {
            node for node in self._floats
            if node not in self.kept and node.op_type not in self._forced
            and (node.op_type in _MOVES or all(self._origins[output] == _STORED for output in node.outputs))
        }  # fmt: skip
        readers = {node for node in self._floats if not _makes_floats(node)}
        wanted: dict[ir.Value, set[bool]] = {}  # value → whether it is wanted low, by those who care
        for node in reversed(self._nodes):
            for output in node.outputs:
                wanted.setdefault(output, set()).update({False} if output.is_graph_output() else set())
            through = set().union(*(wanted[output] for output in node.outputs)) if node in flexible else None
            for index, value in enumerate(node.inputs):
                if value is None or not is_float(value):
                    continue
                asks = wanted.setdefault(value, set())
                if through is not None:
                    asks |= through
                elif _makes_floats(node) or is_control(node):
                    asks.add(self._reads_low(node, index))
        low: set[ir.Value] = set()
        for node in self._nodes:
            sources = [v for v in node.inputs if v is not None and is_float(v) and not self._at_hand(v)]
            if node in flexible:
                asked = set().union(*(wanted[output] for output in node.outputs))
                whole = [value for value in sources if value not in low]
                if (whole and (False in asked or not asked)) or (not sources and asked == {False}):
                    self._keep(node, "moves float32 numbers")
            elif node in readers and not (sources and all(value in low for value in sources)):
                self._keep(node, "reads float32 numbers")
            if node in self.slots and node not in self.kept and node.op_type not in IGNORED:
                slots = self.slots[node]
                low.update(node.outputs[index] for index in (slots.outputs if slots is not None else ()))

    def _reads_low(self, node: ir.Node, index: int) -> bool:
        slots = self.slots.get(node)
        return node not in self.kept and slots is not None and index in slots.inputs

    @staticmethod
    def _at_hand(value: ir.Value) -> bool:
        """Whether ``value`` costs nothing in either type: it is stored, or cast from what is no float32."""
        maker = value.producer()
        cast = maker is not None and maker.op_type == "Cast" and not is_float(maker.inputs[0])
        return stored(value) is not None or cast


_BEFORE_SOFTMAX: Final = "on the way into a softmax"


def _touches_floats(node: ir.Node) -> bool:
    return any(is_float(value) for value in (*node.inputs, *node.outputs))


def _makes_floats(node: ir.Node) -> bool:
    return any(is_float(output) for output in node.outputs)


def _is_accumulator(value: ir.Value | None) -> bool:
    cast = value.producer() if value is not None and value.dtype == FLOAT else None
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    maker = source.producer() if source is not None else None
    return maker is not None and maker.op_type in _INTEGER_PRODUCTS


def _is_layer(node: ir.Node) -> bool:
    """A product that sums over more than one term; positions times frequencies sum over one."""
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[0].shape is None:
        return node.op_type == "MatMul"
    return bool(len(node.inputs[0].shape)) and node.inputs[0].shape[-1] != 1
