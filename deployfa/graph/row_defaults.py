"""Give the row inputs of a graph their values, after it was fused: a fusion would fold a default away."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.errors import PlanError
from deployfa.graph.row_values import STRENGTH
from deployfa.tables.layout import LABELS

__all__ = ["attach_defaults", "bake", "default_strength", "detach_defaults"]


def attach_defaults(model: ir.Model, values: Mapping[str, Array]) -> None:
    """Make the inputs ``values`` optional: what a run does not feed is taken from here.  Changes ``model``."""
    inputs = {value.name: value for value in model.graph.inputs}
    for name, array in values.items():
        value = inputs.get(name)
        if value is None:
            raise PlanError(f"the graph has no input '{name}' to give a default")
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
        model.graph.register_initializer(value)


def detach_defaults(model: ir.Model) -> dict[str, Array]:
    """Make every optional input one that must be fed, and return what it was without; names of labels, which nothing
    reads, are no input any more.  Changes ``model``."""
    defaults: dict[str, Array] = {}
    model.graph.initializers.pop(LABELS, None)
    for value in [value for value in model.graph.inputs if value.name == LABELS]:
        model.graph.inputs.remove(value)
    for value in model.graph.inputs:
        name = value.name
        if name is not None and name in model.graph.initializers and value.const_value is not None:
            defaults[name] = np.array(value.const_value.numpy())
            del model.graph.initializers[name]
            value.const_value = None
    return defaults


def bake(model: ir.Model, values: Mapping[str, Array]) -> None:
    """Make the inputs ``values`` constants of the graph.  Changes ``model``."""
    attach_defaults(model, values)
    for name, array in values.items():
        value = next(each for each in model.graph.inputs if each.name == name)
        value.shape = ir.Shape(array.shape)
        model.graph.inputs.remove(value)


def default_strength() -> dict[str, Array]:
    """The whole adapter, for every row."""
    return {STRENGTH: np.ones(1, np.float32)}
