"""An input that no operator reads, so that an ``.onnx_adapter`` can say what its answers mean.

ONNX Runtime refuses a run with an adapter that has a parameter which is no input of the graph, and its format has no
other place for a text.  So the graph takes one: ``adapter_labels`` (n,), uint8, the names as a JSON list in UTF-8.
"""

from __future__ import annotations

import onnx_ir as ir

from deployfa.graph.row_defaults import attach_defaults
from deployfa.tables.label_bytes import label_bytes
from deployfa.tables.layout import LABELS

__all__ = ["add_labels_input"]


def add_labels_input(model: ir.Model) -> None:
    """Let a run of ``model`` be fed names of labels; by default there are none.  Changes ``model``."""
    value = ir.Value(name=LABELS, shape=ir.Shape([f"{LABELS}_bytes"]), type=ir.TensorType(ir.DataType.UINT8))
    model.graph.inputs.append(value)
    attach_defaults(model, {LABELS: label_bytes(())})
