"""The reference's own operators for quantised graphs, against ONNX Runtime's kernels and the operators' pages."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from deployfa.graph.evaluate import evaluate

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6)).astype(np.float32)


def graph(node, stored, output, *, opset=21, x=TensorProto.FLOAT, more=()):
    names = {name for name in node.input if name and name not in stored}
    inputs = [helper.make_tensor_value_info(name, x, None) for name in sorted(names)]
    tensors = [a if isinstance(a, TensorProto) else onnx.numpy_helper.from_array(a, name) for name, a in stored.items()]
    outputs = [helper.make_tensor_value_info(name, of, None) for name, of in output.items()]
    body = helper.make_graph([node, *more], "g", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=imports, ir_version=10)


def both(model, feeds):
    """(what the runtime computes, what the reference does in float32, in float64), first output each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    loaded = ir.from_proto(model)
    reference = [evaluate(loaded, [feeds], dtype=dtype)[0] for dtype in ("float32", "float64")]
    return session.run(None, feeds)[0], *(next(iter(found.values())) for found in reference)


@pytest.mark.parametrize("opset", [13, 17, 19, 21, 23])
@pytest.mark.parametrize(
    ("zero", "axis", "count"), [(np.uint8(7), 1, 1), (np.int8(-3), 1, 6), (np.int8(2), 0, 4), (np.uint8(200), -1, 6)]
)
def test_quantize_and_dequantize(opset, zero, axis, count):
    """At the opsets of old and of new exporters; a masked number far outside every range lands at its end."""
    scale = RNG.uniform(0.01, 0.02, count).astype(np.float32)
    zeros = np.full(count, zero)
    if count == 1:
        scale, zeros = scale[0], zeros[0]
    stored = {"s": np.asarray(scale), "z": np.asarray(zeros)}
    kind = helper.np_dtype_to_tensor_dtype(zeros.dtype)
    x = X.copy()
    x[0, 0], x[1, 1], x[2, 2] = -3.4e38, 3.4e38, 0.0
    there = graph(
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis), stored, {"q": kind}, opset=opset
    )
    found, single, double = both(there, {"x": x})
    assert found.dtype == single.dtype == double.dtype
    assert np.array_equal(found, single) and np.array_equal(found, double)
    bounds = np.iinfo(found.dtype)
    assert (found[0, 0], found[1, 1]) == (bounds.min, bounds.max)

    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"], axis=axis)
    back = graph(node, stored, {"y": TensorProto.FLOAT}, opset=opset, x=kind)
    found, single, double = both(back, {"x": found})
    assert double.dtype == np.float64 and single.dtype == np.float32
    assert np.array_equal(found, single) and np.array_equal(found, double.astype(np.float32))


def test_biases_of_32_bits_keep_all_of_them():
    """In float32 an integer above 2**24 is rounded before it is scaled."""
    q = np.array([2**24 + 1, -(2**30) - 1, 5], np.int32)
    node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"])
    model = graph(node, {"s": np.float32(1.0)}, {"y": TensorProto.FLOAT}, x=TensorProto.INT32)
    (found,) = evaluate(ir.from_proto(model), [{"x": q}])
    assert np.array_equal(found["y"], q.astype(np.float64))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_four_bits(signed, axis):
    shape, block = (8, 6), 4 if axis == 0 else 3
    cells = tuple(-(-n // block) if at == axis else n for at, n in enumerate(shape))
    low, kind = (-8, TensorProto.INT4) if signed else (0, TensorProto.UINT4)
    q, z = (RNG.integers(low, low + 16, size).astype(np.int8) for size in (shape, cells))
    stored = {
        "q": helper.make_tensor("q", kind, shape, q.reshape(-1).tolist()),
        "s": RNG.uniform(0.5, 1.5, cells).astype(np.float32),
        "z": helper.make_tensor("z", kind, cells, z.reshape(-1).tolist()),
    }
    node = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=axis, block_size=block)
    multiply = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = graph(node, stored, {"y": TensorProto.FLOAT, "w": TensorProto.FLOAT}, more=[multiply])
    model.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8]))
    model.graph.output.reverse()
    found, single, double = both(model, {"x": RNG.standard_normal((2, 8)).astype(np.float32)})
    w = stored["s"].repeat(block, axis).astype(np.float64) * (q.astype(np.float64) - z.repeat(block, axis))
    assert np.array_equal(double, w)
    assert np.array_equal(found, single) and np.array_equal(found, w.astype(np.float32))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2])
def test_small_floats_round_by_their_own_rules(kind):
    zero = helper.make_tensor("z", kind, [], [0.0])
    there = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    stored = {"s": np.float32(0.25), "z": zero}
    model = graph(there, stored, {"y": TensorProto.FLOAT}, more=[back])
    found, single, double = both(model, {"x": np.array([1e6, -0.3, 0.0, 1.7, -1e-9], np.float32)})
    assert np.array_equal(found, single) and np.array_equal(found, double)


@pytest.mark.parametrize("x", [X, np.abs(X) + 1, -np.abs(X) - 1, np.zeros_like(X)], ids=["both", "above", "below", "0"])
def test_dynamic_quantisation(x):
    """Zero is always in the range; nothing but zeros has no range at all."""
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    kinds = {"q": TensorProto.UINT8, "s": TensorProto.FLOAT, "z": TensorProto.UINT8}
    found, single, double = both(graph(node, {}, kinds), {"x": x})
    if x.any():
        assert np.array_equal(found, single) and np.array_equal(found, double)
    else:
        assert not single.any() and not double.any()


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("answer", ["float", "integers"])
def test_qgemm(transposed, channels, answer):
    w = RNG.integers(-128, 128, (5, 6) if transposed else (6, 5)).astype(np.int8)
    stored = {
        "xs": np.float32(0.02),
        "xz": np.uint8(120),
        "w": w,
        "ws": RNG.uniform(0.01, 0.02, channels).astype(np.float32),
        "wz": RNG.integers(-3, 4, channels).astype(np.int8),
        "c": RNG.integers(-9000, 9000, 5).astype(np.int32),
        "ys": np.float32(0.1),
        "yz": np.uint8(100),
    }
    if channels == 1:
        stored |= {"ws": stored["ws"][0], "wz": stored["wz"][0]}
    names = ["x", "xs", "xz", "w", "ws", "wz", "c"] + (["ys", "yz"] if answer == "integers" else [])
    node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft", transB=transposed, alpha=1.0)
    stored = {name: np.asarray(array) for name, array in stored.items() if name in names}
    kind = TensorProto.UINT8 if answer == "integers" else TensorProto.FLOAT
    feeds = {"x": RNG.integers(0, 256, (4, 6)).astype(np.uint8)}
    found, single, double = both(graph(node, stored, {"y": kind}, x=TensorProto.UINT8), feeds)
    assert found.dtype == single.dtype and len(np.unique(found)) > 10
    if answer == "integers":
        assert np.array_equal(found, single) and np.array_equal(found, double)
    else:
        # the product is an integer; two scales multiply it
        assert np.allclose(found, double, rtol=4 * 2.0**-24, atol=0)
        assert np.allclose(found, single, rtol=4 * 2.0**-24, atol=0)


# onnxruntime has no kernel for zero points in floats at 8 bits
@pytest.mark.parametrize(
    ("bits", "zero"),
    [(bits, zero) for bits in (4, 8, None) for zero in ("none", "packed", "floats") if (bits, zero) != (8, "floats")],
)
def test_matmul_nbits(bits, zero):
    """k = 40 in blocks of 16: the last block is half empty, and an odd number of them leaves half a byte of zeros."""
    k, d, block, width = 40, 5, 16, bits or 4
    blocks = 3
    stored = {
        "b": RNG.integers(0, 256, (d, blocks, block * width // 8)).astype(np.uint8),
        "s": RNG.uniform(0.1, 0.2, (d * blocks)).astype(np.float32),
    }
    if zero == "packed":
        stored["z"] = RNG.integers(0, 256, d * -(-blocks * width // 8)).astype(np.uint8)
    elif zero == "floats":
        stored["z"] = RNG.uniform(0, 2**width, d * blocks).astype(np.float32)
    attributes = {"K": k, "N": d, "block_size": block} | ({"bits": bits} if bits else {})
    node = helper.make_node("MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", **attributes)
    x = RNG.standard_normal((3, k)).astype(np.float32)
    found, single, double = both(graph(node, stored, {"y": TensorProto.FLOAT}), {"x": x})
    size = np.abs(x).sum(axis=1, keepdims=True) * 2.0**width * 0.2
    assert (np.abs(found - double) <= k * 2.0**-24 * size).all()
    assert (np.abs(single - double) <= k * 2.0**-24 * size).all()
    assert (np.abs(double) > 1e-3).any()
