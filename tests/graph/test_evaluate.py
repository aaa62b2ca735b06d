"""Float64 all the way, and the graph is left as it was."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from deployfa.graph.evaluate import evaluate

X = np.array([[0.1, 0.7, 1.3], [-2.1, 0.3, 0.9]], np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_feed_is_widened_before_anything_is_computed(builder, as_bytes, dtype):
    g = builder(dtype)
    x = g.input("x", 2, 3)
    model = g.model(g.op("Exp", x, out="y"))
    before, feed = as_bytes(model), X.astype(dtype)
    kept = feed.tobytes()
    (found,) = evaluate(model, [{"x": feed, "unused": X}])
    assert found["y"].dtype == np.float64
    exact = np.array([[math.exp(float(v)) for v in row] for row in feed])
    assert np.all(np.abs(found["y"] - exact) <= 2.0**-52 * exact)  # libm's exp is good to one unit
    assert as_bytes(model) == before and feed.tobytes() == kept


@pytest.mark.parametrize("attribute", ["value", "value_float", "value_floats"])
def test_constants_and_casts_are_widened(builder, attribute):
    g = builder()
    x = g.input("x", 2, 3)
    value = {"value": ir.tensor(np.float32([0.5])), "value_float": 0.5, "value_floats": [0.5, 0.5, 0.5]}[attribute]
    c = g.op("Constant", **{attribute: value})
    y = g.op("Mul", g.op("Cast", g.op("Cast", x, to=10), to=1), c, out="y")
    (found,) = evaluate(g.model(y), [{"x": X}])
    assert np.array_equal(found["y"], X.astype(np.float64) / 2)


def test_float32_stays_float32_and_is_another_number(builder):
    g = builder()
    x = g.input("x", 2, 3)
    model = g.model(g.op("MatMul", x, g.const("w", np.full((3, 3), 1 / 3)), out="y"))
    (double,), (single,) = evaluate(model, [{"x": X}]), evaluate(model, [{"x": X}], dtype="float32")
    assert single["y"].dtype == np.float32 and double["y"].dtype == np.float64
    error = np.abs(single["y"] - double["y"])
    assert 0 < error.max() <= 4 * 2.0**-24 * np.abs(X).sum(axis=1).max()


def test_integers_stay_and_cases_come_back_in_order(builder):
    g = builder()
    ids = g.input("ids", 2, dtype=ir.DataType.INT64)
    model = g.model(g.op("Gather", g.const("table", X), ids, out="y"))
    found = evaluate(model, ({"ids": np.array(pair)} for pair in ([0, 1], [1, 0])))
    assert [np.array_equal(f["y"], X[pair]) for f, pair in zip(found, ([0, 1], [1, 0]), strict=True)] == [True, True]


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_gather_elements_along_any_axis_of_any_length(builder, axis):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((70, 80)).astype(np.float32)
    indices = rng.integers(0, min(x.shape), (65, 66))
    g = builder()
    picked = g.op("GatherElements", g.input("x", *x.shape), g.const("indices", indices), axis=axis, out="y")
    (found,) = evaluate(g.model(picked), [{"x": x}])
    at = axis % 2
    for i, j in ((0, 0), (64, 65), (3, 40)):
        row, column = (indices[i, j], j) if at == 0 else (i, indices[i, j])
        assert found["y"][i, j] == np.float64(x[row, column])
