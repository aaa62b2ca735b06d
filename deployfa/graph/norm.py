"""Placement ``norm``: fold an edit into the scale and shift of the norm that the site's input comes from.

That input is ``γ ⊙ z + β``, so ``T(x) = (1+λ) ⊙ x + δ`` is ``γ' = (1+λ) γ``, ``β' = (1+λ) β + δ``: exact, free at run
time, and a patch of two vectors.  Sources: arXiv 2510.19155 for T; the ONNX pages of LayerNormalization,
RMSNormalization, BatchNormalization, InstanceNormalization and GroupNormalization for where scale and shift stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deployfa.edits import Float64
from deployfa.graph.carry import Carried
from deployfa.graph.tensors import cast_once, set_operand
from deployfa.graph.views import constant, tensor_shape

__all__ = ["Norm", "find_norm", "fold_into_norms"]

#: Operators with a scale in input 1 and a shift in input 2, over the last axis or over channels.
_OVER_FEATURES = {"LayerNormalization"}
_OVER_CHANNELS = {"BatchNormalization", "InstanceNormalization", "GroupNormalization"}
_WITHOUT_SHIFT = {"RMSNormalization", "SimplifiedLayerNormalization"}


@dataclass(frozen=True, eq=False)
class Norm:
    """Where a norm keeps γ and β.  ``offset`` is what the graph adds to the stored γ (Gemma stores γ - 1).

    ``node``: what makes its output; ``shift_node`` is ``None`` for a norm that has no shift and cannot get one;
    ``flat``: γ and β are plain vectors, else they broadcast over the output as they lie.
    """

    node: ir.Node
    scale_node: ir.Node
    scale_index: int
    shift_node: ir.Node | None
    shift_index: int
    offset: float
    flat: bool

    @property
    def scale(self) -> ir.Value:
        value = self.scale_node.inputs[self.scale_index]
        assert value is not None  # find_norm takes only constants
        return value

    @property
    def shift(self) -> ir.Value | None:
        node = self.shift_node
        return node.inputs[self.shift_index] if node is not None and self.shift_index < len(node.inputs) else None

    @property
    def bytes(self) -> int:
        """What a patch of this norm weighs: γ and, if there is one, β."""
        tensors = [constant(value) for value in (self.scale, self.shift) if value is not None]
        return sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)

    def reads_as(self, other: Norm) -> bool:
        """Whether both make one γ of one stored vector: not so where one adds 1 to it."""
        return (self.offset, self.flat) == (other.offset, other.flat)

    def why_not(self, change: Carried) -> str | None:
        """What keeps ``change`` of its output from going into γ and β."""
        return "norm has no shift for δ" if change.shift is not None and self.shift_node is None else None


def find_norm(value: ir.Value, change: Carried) -> Norm | None:
    """The norm that makes ``value`` and has a stored scale with room for ``change``; ``None`` if there is none."""
    node = value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return None
    if node.op_type in _OVER_FEATURES | _OVER_CHANNELS | _WITHOUT_SHIFT:
        return _operator(node, change)
    if node.op_type == "Add":
        return _multiply_add(node, change)
    return _multiply(node, node, change, None, 0) if node.op_type == "Mul" else None


def fold_into_norms(graph: ir.Graph, norms: Sequence[Norm], change: Carried, name: str) -> None:
    """``γ' = (1+λ) γ``, ``β' = (1+λ) β + δ``, in float64, rounded once, in norms that all get the same change.

    Norms that share one stored γ (a layer called twice) go on sharing it.
    """
    _write(
        graph,
        [(norm.scale_node, norm.scale_index) for norm in norms],
        lambda gamma: (gamma + norms[0].offset) * _over(change.factor, norms[0], gamma.shape) - norms[0].offset,
        f"{name}/norm_scale",
    )
    with_shift = [norm for norm in norms if norm.shift is not None]
    _write(
        graph,
        [(norm.shift_node, norm.shift_index) for norm in with_shift if norm.shift_node is not None],
        lambda beta: beta * _over(change.factor, norms[0], beta.shape) + _shift(change, norms[0], beta.shape),
        f"{name}/norm_shift",
    )
    if change.shift is None:
        return
    for norm in norms:
        if norm.shift is None and norm.shift_node is not None:
            stored = constant(norm.scale)
            assert stored is not None  # find_norm takes only constants
            shift = _shift(change, norm, tensor_shape(stored))
            array = cast_once(shift, stored.dtype, name)
            set_operand(graph, [norm.shift_node], norm.shift_index, array, name=f"{name}/norm_shift")


def _write(
    graph: ir.Graph, operands: Sequence[tuple[ir.Node, int]], changed: Callable[[Float64], Float64], name: str
) -> None:
    """Store ``changed`` of each operand; nodes that read one stored vector get one back."""
    readers: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    for node, index in operands:
        value = node.inputs[index]
        assert value is not None  # find_norm takes only constants
        readers.setdefault((value, index), []).append(node)
    for (value, index), nodes in readers.items():
        tensor = constant(value)
        assert tensor is not None  # find_norm takes only constants
        array = np.asarray(changed(np.asarray(tensor.numpy()).astype(np.float64)))
        set_operand(graph, nodes, index, cast_once(array, tensor.dtype, name), name=name)


def _operator(node: ir.Node, change: Carried) -> Norm | None:
    """A norm that is one node."""
    channels = node.op_type in _OVER_CHANNELS
    rank = change.factor.ndim
    axis = 1 if channels else rank - 1
    if not channels and node.attributes.get_int("axis", -1) not in {-1, axis}:
        return None
    if node.op_type == "BatchNormalization" and node.attributes.get_int("training_mode", 0) != 0:
        return None
    arrays = [change.factor] + ([change.shift] if change.shift is not None else [])
    if any(size != 1 for array in arrays for at, size in enumerate(array.shape) if at != axis):
        return None
    # a node with further outputs (mean, running statistics) computes them from the input: they do not change
    scale = _stored(node.inputs[1])
    if scale is None or any(array.shape[axis] not in {1, scale.size} for array in arrays):
        return None
    has_shift = node.op_type not in _WITHOUT_SHIFT
    shift = node.inputs[2] if has_shift and len(node.inputs) > 2 else None
    if shift is not None and _stored(shift) is None:
        return None
    return Norm(node, node, 1, node if has_shift else None, 2, 0.0, flat=True)


def _multiply_add(node: ir.Node, change: Carried) -> Norm | None:
    """``z ⊙ γ + β`` as exporters decompose it."""
    for index, operand in enumerate(node.inputs):
        product = node.inputs[1 - index]
        if _has_room(operand, change) and product is not None and len(product.uses()) == 1:
            producer = product.producer()
            if producer is not None and producer.op_type == "Mul" and not product.is_graph_output():
                return _multiply(node, producer, change, node, index)
    return None


def _multiply(
    node: ir.Node, product: ir.Node, change: Carried, shift_node: ir.Node | None, shift_index: int
) -> Norm | None:
    """``z ⊙ γ``, with γ a constant or Gemma's ``1 + w``."""
    for index, operand in enumerate(product.inputs):
        if _has_room(operand, change):
            return Norm(node, product, index, shift_node, shift_index, 0.0, flat=False)
        adder = operand.producer() if operand is not None else None
        if adder is None or adder.op_type != "Add" or operand is None or len(operand.uses()) != 1:
            continue
        if operand.is_graph_output():
            continue
        for at, stored in enumerate(adder.inputs):
            one = constant(adder.inputs[1 - at])
            if _has_room(stored, change) and one is not None and one.size == 1:
                offset = float(one.numpy().reshape(()))
                return Norm(node, adder, at, shift_node, shift_index, offset, flat=False)
    return None


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    tensor = constant(value)
    return tensor if tensor is not None and tensor.dtype.is_floating_point() else None


def _has_room(value: ir.Value | None, change: Carried) -> bool:
    """Whether ``value`` is a stored vector or table with a number wherever ``change`` varies."""
    tensor = _stored(value)
    if tensor is None or tensor.size < 2:
        return False
    own = tensor_shape(tensor)
    arrays = [change.factor] + ([change.shift] if change.shift is not None else [])
    rank = change.factor.ndim
    if len(own) > rank:
        return False
    padded = (1,) * (rank - len(own)) + own
    return all(size in {1, there} for array in arrays for size, there in zip(array.shape, padded, strict=True))


def _over(array: Float64, norm: Norm, shape: tuple[int, ...]) -> Float64:
    """``array``, which has the rank of the norm's output, over a γ or β of ``shape``."""
    if norm.flat:
        return array.reshape(-1)
    return array.reshape(array.shape[array.ndim - len(shape) :]) if len(shape) < array.ndim else array


def _shift(change: Carried, norm: Norm, shape: tuple[int, ...]) -> Float64:
    return np.zeros(()) if change.shift is None else np.broadcast_to(_over(change.shift, norm, shape), shape)
