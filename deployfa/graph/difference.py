"""What an update has to ship: the tensors in which two graphs of one structure differ.

Both graphs come out of the same rewriting and the same fusion, so their nodes stand in one order; names do not count,
because fusing numbers them anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array

__all__ = ["StructureDiffers", "changed_tensors", "with_tensors"]

Body = ir.Graph | ir.Function
#: Name of an initializer of the first graph → itself, and what stands in its place in the other.
Pairs = dict[str, tuple[ir.Value, ir.Value]]


class StructureDiffers(Exception):
    """The graphs are not one structure with other numbers: ``what`` differs, at nodes or tensors of these ``names``.

    For the caller, who knows which site the names belong to, to turn into an error for a person.
    """

    def __init__(self, what: str, names: tuple[str, ...]) -> None:
        super().__init__(what)
        self.what = what
        self.names = names


def changed_tensors(graph: ir.Model, other: ir.Model) -> dict[str, Array]:
    """Initializer of ``graph`` → its values in ``other``, where they are not the same bits.

    Raises ``StructureDiffers`` if anything but values differs, also where one initializer of ``graph`` stands for two
    of ``other`` with different values.
    """
    pairs: Pairs = {}
    matched: dict[ir.Value, ir.Value] = {}
    if graph.functions.keys() != other.functions.keys():
        raise StructureDiffers("the functions", ())
    # what a caller feeds by name; inside subgraphs names are numbers
    if [value.name for value in graph.graph.inputs] != [value.name for value in other.graph.inputs]:
        raise StructureDiffers("the inputs", _names(*graph.graph.inputs, *other.graph.inputs))
    if [value.name for value in graph.graph.outputs] != [value.name for value in other.graph.outputs]:
        raise StructureDiffers("the outputs", _names(*graph.graph.outputs, *other.graph.outputs))
    _match_graphs(graph.graph, other.graph, matched, pairs)
    for identifier, function in graph.functions.items():
        _match_graphs(function, other.functions[identifier], matched, pairs)
    changed = {name: new for name, (old, new) in pairs.items() if not _same_bits(old, new)}
    for name in changed:
        if name not in graph.graph.initializers:
            raise StructureDiffers("a tensor inside a subgraph changed", (name,))
    return {name: _array(new) for name, new in changed.items()}


def with_tensors(graph: ir.Model, tensors: Mapping[str, Array]) -> ir.Model:
    """A copy of ``graph`` with other values in its initializers, by name; every other weight is shared."""
    result = graph.clone()
    for name, array in tensors.items():
        value = result.graph.initializers[name]
        value.const_value = ir.tensor(array, dtype=value.dtype, name=name)
    return result


def _match_graphs(ours: Body, theirs: Body, matched: dict[ir.Value, ir.Value], pairs: Pairs) -> None:
    for left, right in zip_longest(ours.inputs, theirs.inputs):
        if left is None or right is None:
            raise StructureDiffers("the number of inputs", _names(left, right))
        matched[left] = right
    for node, twin in zip_longest(ours, theirs):
        if node is None or twin is None or _kind(node) != _kind(twin):
            raise StructureDiffers(f"{_shown(node)} became {_shown(twin)}", _names(node, twin))
        _match_values(node.inputs, twin.inputs, matched, pairs, (node, twin))
        _match_attributes(node, twin, matched, pairs)
        if len(node.outputs) != len(twin.outputs):
            raise StructureDiffers(f"{_shown(node)} has another number of outputs", _names(node, twin))
        matched.update(zip(node.outputs, twin.outputs, strict=True))
    _match_values(ours.outputs, theirs.outputs, matched, pairs, ())


def _match_values(
    ours: Sequence[ir.Value | None],
    theirs: Sequence[ir.Value | None],
    matched: dict[ir.Value, ir.Value],
    pairs: Pairs,
    nodes: tuple[ir.Node, ...],
) -> None:
    for left, right in zip_longest(ours, theirs):
        if left is None and right is None:
            continue
        names = _names(left, right, *nodes)
        if left is None or right is None:
            raise StructureDiffers("an operand was added or left out", names)
        if left.is_initializer() != right.is_initializer():
            raise StructureDiffers("a constant became computed, or the reverse", names)
        if not left.is_initializer():
            if matched.get(left) is not right:
                raise StructureDiffers("an operand comes from elsewhere", names)
            continue
        if left.const_value is None or right.const_value is None:
            raise StructureDiffers("an initializer has no value", names)
        if left.dtype != right.dtype or left.const_value.shape != right.const_value.shape:
            raise StructureDiffers(
                f"a tensor is {_type(right)} and no longer {_type(left)}", _names(left, right, *nodes)
            )
        _, first = pairs.setdefault(left.name or "", (left, right))
        if first is not right and not _same_bits(first, right):
            raise StructureDiffers("what was one tensor for several layers became two", _names(right, left, first))


def _match_attributes(node: ir.Node, twin: ir.Node, matched: dict[ir.Value, ir.Value], pairs: Pairs) -> None:
    for name, attribute in node.attributes.items():
        other = twin.attributes[name]
        if attribute.type == ir.AttributeType.GRAPH:
            _match_graphs(attribute.as_graph(), other.as_graph(), matched, pairs)
        elif attribute.type == ir.AttributeType.GRAPHS:
            for left, right in zip(attribute.as_graphs(), other.as_graphs(), strict=True):
                _match_graphs(left, right, matched, pairs)
        elif attribute.type == ir.AttributeType.TENSOR:
            if not _same_tensor(attribute.as_tensor(), other.as_tensor()):
                raise StructureDiffers(f"attribute '{name}' of {_shown(node)} changed", _names(node, twin))
        elif attribute.value != other.value:
            raise StructureDiffers(f"attribute '{name}' of {_shown(node)} changed", _names(node, twin))


def _kind(node: ir.Node) -> tuple[Any, ...]:
    attributes = sorted((name, attribute.type.value) for name, attribute in node.attributes.items())
    return node.domain, node.op_type, node.overload, attributes


def _same_bits(left: ir.Value, right: ir.Value) -> bool:
    assert left.const_value is not None and right.const_value is not None  # _match_values has looked
    return left is right or _same_tensor(left.const_value, right.const_value)


def _same_tensor(left: ir.TensorProtocol, right: ir.TensorProtocol) -> bool:
    if left is right:
        return True
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    # as bytes: a NaN is itself, and 0 is not -0
    return left.tobytes() == right.tobytes()


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    found = value.const_value.numpy()
    array: Array = np.ascontiguousarray(found).reshape(found.shape)
    return array


def _type(value: ir.Value) -> str:
    assert value.const_value is not None
    return f"{value.const_value.dtype.name.lower()} {[*value.const_value.shape]}"


def _shown(node: ir.Node | None) -> str:
    return node.op_type if node is not None else "nothing"


def _names(*parts: ir.Value | ir.Node | None) -> tuple[str, ...]:
    def each() -> Iterator[str]:
        for part in parts:
            if isinstance(part, ir.Node):
                yield from (value.name or "" for value in (*part.inputs, *part.outputs) if value is not None)
                yield part.name or ""
            elif part is not None:
                yield part.name or ""

    return tuple(name for name in each() if name)
