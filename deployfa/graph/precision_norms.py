"""Find the norms that exporters write in pieces: RMSNorm as Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul.

From every reduction it goes

- back, to what is reduced: a square (``Pow``, ``Mul(x, x)``), which is what overflows: 300² is more than float16 holds;
- on, through the steps that make a divisor of it: ε, a root, a reciprocal;
- to the application, where it meets the features (``x - mean``, ``x / std``), and to γ and β after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

from deployfa.graph.precision_types import is_float

__all__ = ["REDUCTIONS", "decomposed_norms"]

#: What sums up many numbers: the sum may overflow, and each addition to a large sum loses digits of the small term.
REDUCTIONS = frozenset(
    {
        *("GlobalAveragePool", "GlobalLpPool", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"),
        *("ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    }
)
_STATISTIC = frozenset(
    {
        *("Abs", "Add", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"),
    }
)
_APPLIES = frozenset({"Div", "Mul", "Sub"})
_AFFINE = frozenset({"Add", "Div", "Mul", "Sub"})
_PASSED = frozenset({"Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def decomposed_norms(nodes: Iterable[ir.Node], is_constant: Callable[[ir.Value], bool]) -> set[ir.Node]:
    """The nodes around reductions that normalise; ``is_constant``: whether a value is stored or made of such."""
    found = _Norms(is_constant)
    for node in nodes:
        if node.op_type in REDUCTIONS and is_float(node.inputs[0]):
            assert node.inputs[0] is not None  # a float input is one
            found.reduced(node.inputs[0])
            found.statistic(node.outputs[0])
        elif node.op_type == "InstanceNormalization":
            # how GroupNorm is written: its own γ and β come after
            found.scaled(node.outputs[0])
    return found.members


class _Norms:
    def __init__(self, is_constant: Callable[[ir.Value], bool]) -> None:
        self._is_constant = is_constant
        self._statistics: set[ir.Value] = set()
        self._applied: set[ir.Value] = set()
        self.members: set[ir.Node] = set()

    def reduced(self, value: ir.Value) -> None:
        """Back from a reduction to the square that it reduces."""
        maker = value.producer()
        while maker is not None and maker.op_type in _PASSED and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        if maker is None:
            return
        if maker.op_type in {"Pow", "Abs"} or (maker.op_type == "Mul" and maker.inputs[0] is maker.inputs[1]):
            self.members.add(maker)

    def statistic(self, value: ir.Value) -> None:
        """On from a value of one number for many features."""
        if value in self._statistics:
            return
        self._statistics.add(value)
        for node in value.consumers():
            if node.op_type in _PASSED and node.inputs[0] is value:
                self.statistic(node.outputs[0])
            if node.op_type not in _STATISTIC:
                continue
            if self._features(node, value):
                if node.op_type in _APPLIES:
                    self.members.add(node)
                    self.scaled(node.outputs[0])
            else:
                self.members.add(node)
                self.statistic(node.outputs[0])

    def scaled(self, value: ir.Value) -> None:
        """On from normalised features through γ and β."""
        if value in self._applied:
            return
        self._applied.add(value)
        for node in value.consumers():
            if node.op_type in _PASSED and node.inputs[0] is value:
                self.scaled(node.outputs[0])
            elif node.op_type in _AFFINE and all(self._is_constant(other) for other in _others(node, value)):
                self.members.add(node)
                self.scaled(node.outputs[0])

    def _features(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether ``node`` reads, besides ``value``, what is neither stored nor a statistic."""
        return any(
            is_float(other) and other not in self._statistics and not self._is_constant(other)
            for other in _others(node, value)
        )


def _others(node: ir.Node, value: ir.Value) -> Iterator[ir.Value]:
    return (other for other in node.inputs if other is not None and other is not value)
