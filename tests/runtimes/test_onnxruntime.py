"""OnnxRuntimeRunner on real graphs: right answers, and a clear refusal of everything else."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError
from deployfa.graph.storage import save_graph
from deployfa.runtimes import TensorSpec
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

WEIGHT = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)


def save(path: Path, nodes, inputs, outputs, initializers=()) -> Path:
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> Path:
    """``y = x W * lam`` with a mask that must have x's batch, and lam a slot."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "mask"], ["m"]),
        helper.make_node("Mul", ["m", "lam"], ["y"]),
    ]
    return save(
        tmp_path_factory.mktemp("graph") / "linear.onnx",
        nodes,
        [
            value("x", TensorProto.FLOAT, ["batch", 3]),
            value("mask", TensorProto.FLOAT, ["batch", 1]),
            value("lam", TensorProto.FLOAT, [2]),
        ],
        [value("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.ones(2, np.float32), "lam")],
    )


@pytest.fixture(scope="module")
def runner(linear) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(linear, threads=1, spinning=False)


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    x = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    return {"x": x, "mask": np.full((4, 1), 2, np.float32)}


def test_runs_and_tells_its_specs(runner, feeds):
    (y,) = runner.run(feeds).values()
    np.testing.assert_allclose(y, 2 * feeds["x"] @ WEIGHT, rtol=1e-5)
    assert runner.inputs == (
        TensorSpec("x", "float32", ("batch", 3)),
        TensorSpec("mask", "float32", ("batch", 1)),
    )
    assert runner.outputs == (TensorSpec("y", "float32", ("batch", 2)),)
    assert runner.slots == (TensorSpec("lam", "float32", (2,)),)


def test_a_slot_may_be_fed(runner, feeds):
    lam = np.array([3, -1], np.float32)
    with_slot = runner.run({**feeds, "lam": lam})["y"]
    np.testing.assert_allclose(with_slot, runner.run(feeds)["y"] * lam, rtol=1e-6)


@pytest.mark.parametrize("form", [str, Path, lambda path: path.read_bytes()])
def test_path_text_and_bytes_are_the_same_model(linear, runner, feeds, form):
    other = OnnxRuntimeRunner(form(linear), threads=1)
    np.testing.assert_array_equal(other.run(feeds)["y"], runner.run(feeds)["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "input 'mask' is missing; feed all of: x, mask"),
        ({"extra": np.zeros(1)}, "'extra' is not an input of this graph; its inputs: x, mask, lam"),
        ({"x": np.zeros((4, 3))}, "input 'x' is float64; feed float32"),
        ({"x": np.zeros(3, np.float32)}, "input 'x' has shape [3]; feed [batch, 3]"),
        ({"x": np.zeros((4, 5), np.float32)}, "input 'x' has shape [4, 5]; feed [batch, 3]"),
        ({"lam": np.zeros(3, np.float32)}, "input 'lam' has shape [3]; feed [2]"),
        ({"mask": np.ones((3, 1), np.float32)}, "input 'mask' has batch 3, but input 'x' has 4; make them the same"),
        ({"x": [[1.0, 2.0, 3.0]]}, "input 'x' is a list; feed a numpy array"),
    ],
)
def test_a_wrong_feed_is_refused_before_the_runtime_is_touched(runner, feeds, change, message, monkeypatch):
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"the session's {name} was touched")

    monkeypatch.setattr(runner, "session", Untouchable())
    wrong = {name: array for name, array in {**feeds, **change}.items() if array is not None}
    with pytest.raises(RuntimeTargetError) as caught:
        runner.run(wrong)
    assert str(caught.value) == message


def test_a_failing_run_carries_the_runtimes_words(tmp_path):
    value = helper.make_tensor_value_info
    path = save(
        tmp_path / "gather.onnx",
        [helper.make_node("Gather", ["w", "i"], ["y"])],
        [value("i", TensorProto.INT64, ["n"])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    runner = OnnxRuntimeRunner(path, threads=1)
    assert runner.run({"i": np.array([2])})["y"].tolist() == [WEIGHT[2].tolist()]
    with pytest.raises(RuntimeTargetError, match=r"onnxruntime failed while running \(.*out of .*bounds.*; check"):
        runner.run({"i": np.array([3])})


def test_a_misspelt_provider_lists_the_available_ones(linear):
    with pytest.raises(
        RuntimeTargetError, match=r"'CpuExecutionProvider' is not in this onnxruntime; available: .*CPUE"
    ):
        OnnxRuntimeRunner(linear, provider="CpuExecutionProvider")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_on_another_provider_is_an_error(linear, monkeypatch):
    """What ONNX Runtime does when a provider's libraries are missing: it says nothing and takes the CPU."""
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(RuntimeTargetError, match=r"asked for CUDAExecutionProvider, but .* runs on CPUE"):
        OnnxRuntimeRunner(linear, provider="CUDAExecutionProvider")


def test_options_reach_the_session(linear):
    import onnxruntime

    options = OnnxRuntimeRunner(linear, threads=1, spinning=False, optimize=False).session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    usual = OnnxRuntimeRunner(linear).session.get_session_options()
    assert usual.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def test_bad_arguments_and_files(linear, tmp_path):
    with pytest.raises(InputError, match="threads is 0"):
        OnnxRuntimeRunner(linear, threads=0)
    with pytest.raises(InputError, match="no graph at"):
        OnnxRuntimeRunner(tmp_path / "absent.onnx")
    (tmp_path / "broken.onnx").write_bytes(linear.read_bytes()[:40])
    with pytest.raises(RuntimeTargetError, match=r"onnxruntime does not load '.*broken\.onnx'") as caught:
        OnnxRuntimeRunner(tmp_path / "broken.onnx")
    assert "\n" not in str(caught.value)


def test_a_missing_onnxruntime_names_the_extra(linear, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"deployfa\[cpu\]") as caught:
        OnnxRuntimeRunner(linear)
    assert (caught.value.package, caught.value.extra) == ("onnxruntime", "cpu")


@pytest.mark.parametrize(
    ("onnx_type", "dtype"),
    [
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.INT64, np.int64),
        (TensorProto.BOOL, np.bool_),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    ],
)
def test_every_dtype_goes_in_and_comes_out(tmp_path, onnx_type, dtype):
    value = helper.make_tensor_value_info
    path = save(
        tmp_path / "identity.onnx",
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Cast", ["x"], ["z"], to=TensorProto.FLOAT)],
        [value("x", onnx_type, [None, 2])],
        [value("y", onnx_type, [None, 2]), value("z", TensorProto.FLOAT, [None, 2])],
    )
    runner = OnnxRuntimeRunner(path, threads=1)
    x = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    assert runner.inputs[0].dtype == np.dtype(dtype).name
    assert runner.inputs[0].shape[1] == 2 and isinstance(runner.inputs[0].shape[0], str)
    found = runner.run({"x": x})
    assert found["y"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found["y"], x)
    np.testing.assert_array_equal(found["z"], x.astype(np.float32))


def test_brief_spinning_ends_with_the_run(tmp_path: Path) -> None:
    """Threads that spin on burn a core after a run; brief ones sleep."""
    import time

    onnxruntime = pytest.importorskip("onnxruntime")
    if [int(part) for part in onnxruntime.__version__.split(".")[:2]] < [1, 32]:
        pytest.skip("the setting came with ONNX Runtime 1.32")
    weight = np.ones((512, 512), np.float32)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([256, 512]))
    stored = ir.Value(name="w", const_value=ir.tensor(weight, name="w"), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMul", [x, stored])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 18})
    path = save_graph(ir.Model(graph, ir_version=10), tmp_path)
    feeds = {"x": np.ones((256, 512), np.float32)}
    runner = OnnxRuntimeRunner(path, threads=2, spinning="brief")
    assert np.array_equal(runner.run(feeds)["y"], feeds["x"] @ weight)
    began = time.process_time()
    time.sleep(0.4)
    # ONNX Runtime's own spinning takes about 0.03
    assert time.process_time() - began < 0.01
