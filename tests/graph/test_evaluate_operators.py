"""Our convolution against PyTorch's, and against the definition where PyTorch has no word for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from onnx.reference import ReferenceEvaluator

from deployfa.graph.evaluate_operators import operators


def run(x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None, **attributes: Any) -> np.ndarray:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    names = ["x", "w", *(["b"] if b is not None else [])]
    arrays = dict(zip(names, (x, w, b), strict=False))
    inputs = [helper.make_tensor_value_info(name, kind, arrays[name].shape) for name in names]
    output = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([helper.make_node("Conv", names, ["y"], **attributes)], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    (y,) = ReferenceEvaluator(model, new_ops=operators()).run(None, arrays)
    return np.asarray(y)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("stride", "dilation", "pad"), [(1, 1, 0), (2, 1, 1), (1, 2, 3), (3, 2, 1)])
def test_equal_to_pytorch(spatial: int, groups: int, stride: int, dilation: int, pad: int) -> None:
    random = np.random.default_rng(spatial)
    x = random.standard_normal((2, 6, *(9, 11, 8)[:spatial]))
    w = random.standard_normal((12, 6 // groups, *(3, 2, 3)[:spatial]))
    b = random.standard_normal(12)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    wanted = convolve(*map(torch.from_numpy, (x, w, b)), stride, pad, dilation, groups).numpy()
    found = run(
        x, w, b, strides=[stride] * spatial, pads=[pad] * 2 * spatial, dilations=[dilation] * spatial, group=groups
    )
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_unequal_padding() -> None:
    random = np.random.default_rng(0)
    x, w = random.standard_normal((1, 2, 5, 6)), random.standard_normal((3, 2, 3, 3))
    wanted = F.conv2d(F.pad(torch.from_numpy(x), (2, 0, 1, 3)), torch.from_numpy(w)).numpy()
    np.testing.assert_allclose(run(x, w, pads=[1, 2, 3, 0]), wanted, atol=1e-12)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_by_name_as_onnx_runtime_has_it(mode: str, stride: int) -> None:
    import onnxruntime

    random = np.random.default_rng(0)
    x = random.standard_normal((1, 2, 7, 8)).astype(np.float32)
    w = random.standard_normal((3, 2, 4, 3)).astype(np.float32)
    inputs = [helper.make_tensor_value_info(name, 1, array.shape) for name, array in (("x", x), ("w", w))]
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[stride, stride])
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", 1, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x, "w": w})
    np.testing.assert_allclose(run(x, w, auto_pad=mode, strides=[stride, stride]), wanted, atol=1e-5)


def test_halves_are_summed_wide() -> None:
    x = np.full((1, 4096, 1, 1), 1.0, np.float16)
    w = np.full((1, 4096, 1, 1), 1.0, np.float16)
    # in float16 a sum of ones stops growing at 2048
    assert run(x, w).item() == 4096.0
