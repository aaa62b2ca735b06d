"""A small model with slots: a layer with λ and δ, one with a LoRFA, and a head; with an idle branch and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.shape_inference
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank
from deployfa.graph.idle import with_idle_branch, with_row
from deployfa.graph.row_labels import add_labels_input
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_slots
from deployfa.graph.storage import save_graph
from deployfa.tables import base_row, row_of

FINGERPRINT = "sha256:" + "base" * 16


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base_model() -> ir.Model:
    """``head(down(relu(up(x))))``."""
    scopes = "pkg.torch.onnx.name_scopes"
    layers = [("up", 6, 9), ("down", 9, 6), ("head", 6, 3)]
    nodes, weights, source = [], [], "x"
    for name, k, d in layers:
        product, output = f"{name}.product", "logits" if name == "head" else f"{name}.y"
        weights += [
            numpy_helper.from_array(numbers(k, k, d), f"{name}.w"),
            numpy_helper.from_array(numbers(d, d), f"{name}.b"),
        ]
        nodes += [
            helper.make_node("MatMul", [source, f"{name}.w"], [product], name=product),
            helper.make_node("Add", [product, f"{name}.b"], [output], name=output),
        ]
        for node in nodes[-2:]:
            node.metadata_props.add(key=scopes, value=repr(["", name, "linear"]))
        if name == "up":
            nodes.append(helper.make_node("Relu", [output], ["h"], name="relu"))
        source = "h" if name == "up" else output
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["batch", 6])],
        [value("logits", TensorProto.FLOAT, ["batch", 3])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def make_adapter(seed: int, *, labels: int = 3, fingerprint: str = FINGERPRINT) -> Adapter:
    edits = {
        "up": Edit(lam=numbers(seed, 6), delta=numbers(seed + 1, 6)),
        "down": Edit(input_low_rank=LowRank(numbers(seed + 2, 2, 9), numbers(seed + 3, 9, 2), 0.5)),
    }
    modules = {"head": {"weight": numbers(seed + 4, labels, 6), "bias": numbers(seed + 5, labels)}}
    return Adapter("mixed", edits, modules=modules, base=BaseReference(fingerprint=fingerprint))


class SlotGraph:
    """The graph in a file, and rows for it."""

    def __init__(
        self, folder: Path, *, idle_branch: bool = True, max_labels: int = 5, takes_labels: bool = True
    ) -> None:
        self.base = base_model()
        self.layout = make_layout(self.base, {"a": make_adapter(1)}, max_labels=max_labels)
        self.zero = base_row(self.layout, base_heads(self.base, self.layout))
        slots = add_slots(self.base, self.layout)
        self.model = with_row(with_idle_branch(self.base, slots) if idle_branch else slots, self.zero)
        if takes_labels:
            add_labels_input(self.model)
        self.idle_branch = idle_branch
        self.path = save_graph(self.model, folder, share_equal=True)
        (folder / "base").mkdir()
        self.base_path = save_graph(self.base, folder / "base")

    def row(self, seed: int, *, labels: int = 3) -> dict[str, Array]:
        weights = base_weights(self.base, self.layout)
        return row_of(make_adapter(seed, labels=labels), self.layout, self.zero, weights=weights)
