"""Other weights for a session: in place before the optimiser looks, wherever the file keeps the old ones."""

from __future__ import annotations

import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployfa.errors import InputError, RuntimeTargetError
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

N = 64


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHTS = {"w": draw(0, N, N), "table": draw(1, N, N), "small": draw(2, 4), "scalar": np.array(2, np.float32)}
NEW = {"w": draw(3, N, N), "table": draw(4, N, N), "small": draw(5, 4), "scalar": np.array(-3, np.float32)}


def save(path: Path, threshold: int = 256) -> Path:
    """``y = scalar (x wᵀ) + table + Σ small``; the optimiser transposes w and adds up small when it loads the graph."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["h"]),
        helper.make_node("Mul", ["h", "scalar"], ["hs"]),
        helper.make_node("Add", ["hs", "table"], ["ht"]),
        helper.make_node("ReduceSum", ["small"], ["sum"], keepdims=0),
        helper.make_node("Add", ["ht", "sum"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", N])],
        [value("y", TensorProto.FLOAT, ["n", N])],
        [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(ir.from_proto(model), path, external_data=f"{path.name}.data", size_threshold_bytes=threshold)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    path = save(tmp_path_factory.mktemp("graph") / "m.onnx")
    stored = {
        tensor.name: tensor.data_location for tensor in onnx.load(path, load_external_data=False).graph.initializer
    }
    outside, inside = TensorProto.EXTERNAL, TensorProto.DEFAULT
    assert stored == {"w": outside, "table": outside, "small": inside, "scalar": inside}
    return path


X = draw(6, N, N)


def truth(weights: dict[str, np.ndarray]) -> np.ndarray:
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    return w["scalar"] * (X.astype(np.float64) @ w["w"].T) + w["table"] + w["small"].sum()


def error(path: Path, values: dict[str, np.ndarray], *, optimize: bool = True) -> float:
    (y,) = OnnxRuntimeRunner(path, threads=1, optimize=optimize, initializers=values).run({"x": X}).values()
    return float(np.abs(y - truth({**WEIGHTS, **values})).max())


def _absolute(w: dict[str, np.ndarray]) -> float:
    size = abs(w["scalar"]) * (np.abs(X) @ np.abs(w["w"]).T) + np.abs(w["table"]) + np.abs(w["small"]).sum()
    return float(size.max())


#: N products added up, a factor and two more sums: at most N + 3 roundings of the sum of what is added, all positive.
BOUND = (N + 3) * np.finfo(np.float32).eps / 2 * max(_absolute(WEIGHTS), _absolute(NEW))


@pytest.mark.parametrize("names", [("w",), ("table",), ("small",), ("scalar",), ("w", "small"), tuple(NEW)])
@pytest.mark.parametrize("optimize", [True, False])
def test_values_are_replaced_before_anything_is_computed_from_the_old(graph, names, optimize) -> None:
    values = {name: NEW[name] for name in names}
    assert error(graph, values, optimize=optimize) < BOUND
    assert np.abs(truth({**WEIGHTS, **values}) - truth(WEIGHTS)).max() > 100 * BOUND, "they matter"


def test_the_call_that_comes_after_the_optimiser_would_be_wrong_here(graph) -> None:
    """Why ``add_initializer`` is not what is used: the transposed weight is the old one's."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    value = ort.OrtValue.ortvalue_from_numpy(NEW["w"])
    options.add_initializer("w", value)
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": X})
    assert np.abs(y - truth(WEIGHTS)).max() < BOUND


@pytest.mark.parametrize("threshold", [0, 1 << 20])
def test_it_does_not_matter_where_the_file_keeps_them(tmp_path, threshold) -> None:
    assert error(save(tmp_path / "m.onnx", threshold), NEW) < BOUND


def test_the_graph_file_may_be_named_relative_to_here(graph, monkeypatch) -> None:
    monkeypatch.chdir(graph.parent)
    assert error(Path(graph.name), NEW) < BOUND


def test_the_session_keeps_its_own_copy(graph) -> None:
    values = {name: array.copy() for name, array in NEW.items()}
    runner = OnnxRuntimeRunner(graph, threads=1, initializers=values)
    for array in values.values():
        array[...] = 0
    del values
    gc.collect()
    assert np.abs(runner.run({"x": X})["y"] - truth(NEW)).max() < BOUND


def test_values_that_own_no_memory_or_lie_across_are_taken(graph) -> None:
    read_only = np.frombuffer(NEW["table"].tobytes(), np.float32).reshape(N, N)
    across = np.asfortranarray(NEW["w"])
    assert error(graph, {"table": read_only, "w": across}) < BOUND


def test_bfloat16_goes_in(tmp_path) -> None:
    value = helper.make_tensor_value_info
    old, new = (draw(seed, N, N).astype(ml_dtypes.bfloat16) for seed in (0, 1))
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT), helper.make_node("Add", ["x", "c"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, [N, N])],
        [value("y", TensorProto.FLOAT, [N, N])],
        [numpy_helper.from_array(old, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    for threshold in (0, 1 << 20):
        path = tmp_path / f"{threshold}.onnx"
        ir.save(ir.from_proto(model), path, external_data=f"{threshold}.data", size_threshold_bytes=threshold)
        (y,) = OnnxRuntimeRunner(path, threads=1, initializers={"w": new}).run({"x": X}).values()
        np.testing.assert_array_equal(y, X + new.astype(np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nope": NEW["w"]}, "has no initializer 'nope' to replace"),
        ({"w": NEW["w"][:32]}, r"is float32 \[64, 64\], the value for it is float32 \[32, 64\]"),
        ({"w": NEW["w"].astype(np.float64)}, r"is float32 \[64, 64\], the value for it is float64 \[64, 64\]"),
        ({"small": NEW["small"][:3]}, r"is float32 \[4\], the value for it is float32 \[3\]"),
        ({"scalar": NEW["small"]}, r"is float32 \[\], the value for it is float32 \[4\]"),
    ],
)
def test_values_of_another_graph_are_refused(graph, values, message) -> None:
    with pytest.raises(RuntimeTargetError, match=message):
        OnnxRuntimeRunner(graph, initializers=values)


def test_a_graph_in_memory_or_a_broken_one_is_refused(graph, tmp_path) -> None:
    with pytest.raises(InputError, match="pass its path"):
        OnnxRuntimeRunner(graph.read_bytes(), initializers=NEW)
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeTargetError, match="not an ONNX graph"):
        OnnxRuntimeRunner(tmp_path / "broken.onnx", initializers=NEW)
