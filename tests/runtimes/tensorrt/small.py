"""Graphs of a few nodes, built in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from deployfa.edits import Array
from deployfa.runtimes.runner import TensorSpec
from deployfa.runtimes.tensorrt import BuildRequest, NodePlace, Sizes

__all__ = ["WIDTH", "after_a_layer", "layer", "small_request", "weights"]

WIDTH = 8


def weights() -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {"w": random.standard_normal((WIDTH, WIDTH)).astype(np.float32), "c": np.ones((3, WIDTH), np.float32)}


def layer() -> NodeProto:
    return helper.make_node("MatMul", ["x", "w"], ["h"], name="layer")


def after_a_layer(op: str, **attributes: Any) -> list[NodeProto]:
    """y = op(x w)."""
    return [layer(), helper.make_node(op, ["h"], ["y"], name=f"the {op}", **attributes)]


def small_request(folder: Path, nodes: Sequence[NodeProto] | None = None, /, **options: Any) -> BuildRequest:
    """A request to build ``nodes``, from x: (batch, 8) to y, their weights in a file of their own; every node is of the
    module ``block.NAME``."""
    nodes = after_a_layer("Relu") if nodes is None else nodes
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights().items() if name in used],
    )
    domains = {node.domain for node in nodes} - {""}
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(domain, 1) for domain in domains)]
    file = folder / "small.onnx"
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, file, save_as_external_data=True, location="small.onnx.data", size_threshold=0)
    given: dict[str, Any] = {
        "target": "tensorrt-rtx",
        "graph": str(file),
        "inputs": [TensorSpec("x", "float32", ("batch", WIDTH))],
        "nodes": [NodePlace(node.name, node.op_type, f"block.{node.name}") for node in nodes],
        "profile": {"batch": Sizes(1, 2, 4)},
        "compute_capabilities": ["8.9"],
    }
    return BuildRequest(**{**given, **options})
