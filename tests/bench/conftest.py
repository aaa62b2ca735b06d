"""Small graphs with as much work in them as asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

GraphMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_graph(tmp_path_factory) -> GraphMaker:
    """``layers`` products of width ``width`` on embedded tokens; the graph's folder also gets its external data."""

    def make(*, layers: int = 1, width: int = 64, external: bool = False) -> Path:
        generator = np.random.default_rng(0)
        embedding = generator.standard_normal((1000, width)).astype(np.float32)
        weights = [generator.standard_normal((width, width)).astype(np.float32) / width**0.5 for _ in range(layers)]
        initializers = [numpy_helper.from_array(embedding, "embedding")]
        initializers += [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
        nodes = [helper.make_node("Gather", ["embedding", "input_ids"], ["h0"])]
        nodes += [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(layers)]
        nodes += [helper.make_node("ReduceMean", [f"h{layers}"], ["y"], keepdims=0)]
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
            initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        path = tmp_path_factory.mktemp("graph") / "model.onnx"
        onnx.save(model, str(path), save_as_external_data=external, location="model.data" if external else None)
        return path

    return make
