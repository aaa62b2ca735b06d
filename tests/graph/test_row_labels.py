"""The input for names of labels: optional, read by nothing, and gone where a graph is taken apart for a runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.graph.idle import adapted_branch, idle_branch, with_idle_branch, with_row
from deployfa.graph.row_defaults import detach_defaults
from deployfa.graph.row_labels import add_labels_input
from deployfa.graph.row_layout import make_layout
from deployfa.graph.row_ops import add_slots
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.tables import base_row
from deployfa.tables.label_bytes import label_bytes

X = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)


@pytest.fixture
def base(builder) -> ir.Model:
    b = builder()
    weight = np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32)
    return b.model(b.op("MatMul", b.input("x", "batch", 5), b.const("w", weight), site="up", out="y"))


@pytest.mark.parametrize("with_branch", [True, False])
def test_nothing_reads_it(base: ir.Model, with_branch: bool) -> None:
    layout = make_layout(base, {"a": Adapter("vefa", {"up": Edit(lam=np.ones(5, np.float32))})})
    slots = add_slots(base, layout)
    model = with_row(with_idle_branch(base, slots) if with_branch else slots, base_row(layout, {}))
    before = [value.name for value in model.graph.inputs]
    plain = OnnxRuntimeRunner(ir.to_proto(model).SerializeToString(), threads=1).run({"x": X})["y"]
    add_labels_input(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    runner = OnnxRuntimeRunner(proto.SerializeToString(), threads=1)
    assert [spec.name for spec in runner.inputs] == ["x"]
    for labels in ((), ("a", "b"), tuple("abcdefgh" * 10)):
        assert np.array_equal(runner.run({"x": X, "adapter_labels": label_bytes(labels)})["y"], plain)
    assert np.array_equal(runner.run({"x": X})["y"], plain)

    graphs = [idle_branch(model), adapted_branch(model)] if with_branch else []
    assert not any(value.name == "adapter_labels" for graph in graphs for value in graph.graph.inputs)
    defaults = detach_defaults(model)
    assert [value.name for value in model.graph.inputs] == before and "adapter_labels" not in defaults
    assert set(defaults) == set(before) - {"x"}
