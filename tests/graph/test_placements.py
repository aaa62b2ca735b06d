"""Every op × part of an edit × placement × shape × dtype: the rewritten graph against numpy, in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.errors import EditError, PlanError
from deployfa.graph import apply_adapter, find_sites, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import OWN_WEIGHT, SIDE_OP

EDITS = [("lam",), ("delta",), ("lorfa",), ("lora",), ("outlam",), ("lam", "delta", "lorfa", "lora", "outlam")]
OPS = ["matmul", "matmul+add", "add+matmul", "gemm kd", "gemm dk", "gemm no bias", "gemm α β", "gemm kd α β=0"]
DTYPES = [np.float32, np.float16]


class Dense:
    def __init__(self, builder, op, k, d, dtype, *, at_output=True, at_input=True):
        rng = np.random.default_rng(11)
        g = builder(dtype)
        self.w, self.c = rng.standard_normal((d, k)).astype(dtype), rng.standard_normal(d).astype(dtype)
        self.alpha = self.beta = 1.0
        self.x = rng.standard_normal((3, k) if "gemm" in op else (2, 3, k)).astype(dtype)
        source = x = g.input("x", "rows", *self.x.shape[1:])
        if not at_input:
            source = g.op("Identity", x)
        out = "y" if at_output else None
        if op == "matmul":
            self.c = None
            y = g.op("MatMul", source, g.const("fc.weight.T", self.w.T), site="fc", out=out)
        elif op in {"matmul+add", "add+matmul"}:
            y = g.op("MatMul", source, g.const("fc.weight.T", self.w.T), site="fc")
            operands = [y, g.const("fc.bias", self.c)]
            y = g.op("Add", *(operands if op == "matmul+add" else operands[::-1]), site="fc", out=out)
        else:
            attributes = {"transB": 0 if "kd" in op else 1}
            inputs = [g.const("fc.weight", self.w.T if "kd" in op else self.w)]
            if op == "gemm no bias":
                self.c = None
            else:
                inputs.append(g.const("fc.bias", self.c))
            if "α" in op:
                self.alpha, self.beta = 0.5, 0.0 if "β=0" in op else -2.0
                attributes |= {"alpha": self.alpha, "beta": self.beta}
            y = g.op("Gemm", source, *inputs, site="fc", out=out, **attributes)
        self.model = g.model(y if at_output else g.op("Identity", y, out="y"))

    def expected(self, truth, edit, **how):
        return truth.dense(edit, self.w, self.c, self.x, self.alpha, self.beta, **how)


def rewrite(model, edit, placement="auto", **how):
    adapter = Adapter("vefa", {"fc": edit})
    plan = make_plan(model, adapter, placement=placement, **how)
    return apply_adapter(model, adapter, plan), plan


def run(model, **feeds):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return evaluate(model, [feeds])[0]["y"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4), (5, 3)])
@pytest.mark.parametrize("placement", ["auto", "side-op"])
@pytest.mark.parametrize("parts", EDITS)
@pytest.mark.parametrize("op", OPS)
def test_dense(builder, truth, op, parts, placement, shape, dtype):
    at = {"at_output": shape == (4, 4), "at_input": placement == "auto"}
    case, edit = Dense(builder, op, *shape, dtype, **at), truth.edit(parts, *shape)
    rewritten, plan = rewrite(case.model, edit, placement)
    assert [e.placement for e in plan.edits] == [OWN_WEIGHT if placement == "auto" else SIDE_OP]
    nodes = {node.op_type for node in rewritten.graph}
    scales = "lam" in parts or "outlam" in parts
    assert ("Mul" in nodes) == (placement == "side-op" and scales)
    y = run(rewritten, x=case.x)
    tolerance = truth.tolerance(case.expected(truth, edit, absolute=True), dtype)
    assert np.all(np.abs(y - case.expected(truth, edit)) <= tolerance)
    # the base is another thing, and is still there
    base = run(case.model, x=case.x)
    assert np.any(np.abs(y - base) > tolerance)
    assert np.all(np.abs(base - case.expected(truth, truth.edit((), *shape))) <= tolerance)
    assert [v.name for v in rewritten.graph.outputs] == ["y"]


CONVS = {
    "1d": {"shape": (4, 6), "kernel": (3,)},
    "1d square no bias": {"shape": (4, 4), "kernel": (3,), "bias": False},
    "2d": {"shape": (3, 4), "kernel": (2, 3)},
    "2d strided padded": {"shape": (3, 4), "kernel": (3, 3), "stride": 2, "pads": 1},
    "pointwise strided": {"shape": (4, 4), "kernel": (1, 1), "stride": 2},
    "groups": {"shape": (4, 6), "kernel": (3,), "groups": 2},
    "groups square padded": {"shape": (4, 4), "kernel": (3,), "groups": 2, "pads": 1},
    "depthwise": {"shape": (4, 4), "kernel": (2, 2), "groups": 4, "bias": False},
    "depthwise multiplied": {"shape": (3, 6), "kernel": (3,), "groups": 3},
}


class Conv:
    def __init__(self, builder, dtype, shape, kernel, groups=1, stride=1, pads=0, bias=True):
        rng = np.random.default_rng(12)
        g = builder(dtype)
        (k, d), rank = shape, len(kernel)
        self.how = {"groups": groups, "stride": stride, "pads": pads}
        self.w = rng.standard_normal((d, k // groups, *kernel)).astype(dtype)
        self.c = rng.standard_normal(d).astype(dtype) if bias else None
        self.x = rng.standard_normal((2, k, 5, 6)[: 2 + rank]).astype(dtype)
        inputs = [g.input("x", *self.x.shape), g.const("fc.weight", self.w)]
        inputs += [g.const("fc.bias", self.c)] if bias else []
        attributes = {"pads": [pads] * 2 * rank, "strides": [stride] * rank, "group": groups, "kernel_shape": kernel}
        self.model = g.model(g.op("Conv", *inputs, site="fc", out="y", **attributes))

    def expected(self, truth, edit, **how):
        return truth.conv(edit, self.w, self.c, self.x, **self.how, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("placement", ["auto", "side-op"])
@pytest.mark.parametrize("parts", EDITS)
@pytest.mark.parametrize("conv", CONVS)
def test_conv(builder, truth, conv, parts, placement, dtype):
    case, config = Conv(builder, dtype, **CONVS[conv]), CONVS[conv]
    edit = truth.edit(parts, *config["shape"], config["kernel"])
    rewritten, plan = rewrite(case.model, edit, placement)
    reason = None
    if placement == "side-op":
        reason = "asked for with --placement side-op"
    elif config.get("groups", 1) > 1 and {"lorfa", "lora"} & set(parts):
        reason = "low rank before a grouped convolution"
    elif config.get("pads") and "delta" in parts:
        reason = "δ before a zero-padded convolution"
    (planned,) = plan.edits
    assert planned.placement == (SIDE_OP if reason else OWN_WEIGHT)
    assert planned.reason.startswith(reason or "folds into its own weight")
    y = run(rewritten, x=case.x)
    tolerance = truth.tolerance(case.expected(truth, edit, absolute=True), dtype)
    assert np.all(np.abs(y - case.expected(truth, edit)) <= tolerance)
    assert np.any(np.abs(y - run(case.model, x=case.x)) > tolerance)


def test_folding_a_shift_into_a_padded_convolution_would_be_seen(builder, truth):
    """The reason of the refusal is real: the fold that is refused gives other numbers at the border."""
    from deployfa.edits import fold_conv

    case = Conv(builder, np.float32, **CONVS["2d strided padded"])
    edit = truth.edit(("delta",), 3, 4)
    _, bias = fold_conv(edit, case.w, case.c)
    wrong = truth.conv(truth.edit((), 3, 4), case.w, bias, case.x, **case.how)
    tolerance = truth.tolerance(case.expected(truth, edit, absolute=True), np.float32)
    far = np.abs(wrong - case.expected(truth, edit)) > tolerance
    assert far[:, :, 0].all() and not far[:, :, 1:-1, 1:-1].any()


def test_pointwise_lora_without_a_kernel(builder, truth):
    config = CONVS["pointwise strided"]
    case, edit = Conv(builder, np.float32, **config), truth.edit(("lora",), 4, 4)
    whole = truth.edit(("lora",), 4, 4, (1, 1))
    for placement in ("auto", "side-op"):
        y = run(rewrite(case.model, edit, placement)[0], x=case.x)
        tolerance = truth.tolerance(case.expected(truth, whole, absolute=True), np.float32)
        assert np.all(np.abs(y - case.expected(truth, whole)) <= tolerance)


def test_a_module_that_pads_with_zeros_itself_takes_no_shift(builder, truth):
    g = builder()
    x, pads = g.input("x", 1, 4, 6), g.const("pads", np.array([0, 0, 1, 0, 0, 1]))
    padded = g.op("Pad", x, pads, site="fc")
    w = np.ones((4, 4, 3))
    model = g.model(g.op("Conv", padded, g.const("fc.weight", w), site="fc", out="y", kernel_shape=[3]))
    with pytest.raises(PlanError, match="pads with zeros, which δ must not reach; train without δ"):
        rewrite(model, truth.edit(("delta",), 4, 4))
    edit, data = truth.edit(("lam", "lorfa"), 4, 4), np.random.default_rng(0).standard_normal((1, 4, 6))
    y = run(rewrite(model, edit)[0], x=data)
    tolerance = truth.tolerance(truth.conv(edit, w, None, data, pads=1, absolute=True), np.float32)
    assert np.all(np.abs(y - truth.conv(edit, w, None, data, pads=1)) <= tolerance)


def corrupt(model, how):
    """Break the rewritten graph the way a wrong fold would; False if there is nothing to break."""
    weight, bias = (model.graph.initializers[name] for name in ("fc.weight.T", "fc.bias"))

    def put(value, array):
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)

    w, c = weight.const_value.numpy(), bias.const_value.numpy()
    if how == "transposed":
        put(weight, w.T)
    elif how == "bias dropped":
        put(bias, np.zeros_like(c))
    elif how == "bias scaled":
        put(bias, c * np.float32(1.01))
    elif how == "rows swapped":
        put(weight, w[[1, 0, 2, 3]])
    elif how == "columns swapped":
        put(weight, w[:, [1, 0, 2, 3]])
    elif how == "one number off by 1e-4":
        put(weight, w + np.where(np.arange(16).reshape(4, 4) == 5, w * np.float32(1e-4), 0))


@pytest.mark.parametrize(
    "how",
    [None, "transposed", "bias dropped", "bias scaled", "rows swapped", "columns swapped", "one number off by 1e-4"],
)
@pytest.mark.parametrize("parts", [("lam",), ("lorfa",), ("delta",)])
def test_the_comparison_sees_a_corrupted_graph(builder, truth, parts, how):
    case, edit = Dense(builder, "matmul+add", 4, 4, np.float32), truth.edit(parts, 4, 4)
    rewritten, _ = rewrite(case.model, edit)
    corrupt(rewritten, how)
    y = run(rewritten, x=case.x)
    tolerance = truth.tolerance(case.expected(truth, edit, absolute=True), np.float32)
    assert np.all(np.abs(y - case.expected(truth, edit)) <= tolerance) == (how is None)


@pytest.mark.parametrize("placement", ["auto", "side-op"])
@pytest.mark.parametrize("op", ["matmul+add", "gemm kd α β=0"])
def test_onnxruntime_gives_the_same(builder, truth, op, placement):
    ort = pytest.importorskip("onnxruntime")
    case, edit = Dense(builder, op, 5, 3, np.float32), truth.edit(EDITS[-1], 5, 3)
    rewritten, _ = rewrite(case.model, edit, placement)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.to_proto(rewritten).SerializeToString(), options, ["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": case.x})
    # float32 sums of at most 5 · 5 · 2 terms along the longest path, on top of the storage's rounding
    magnitude = case.expected(truth, edit, absolute=True)
    tolerance = truth.tolerance(magnitude, np.float32) + 50 * 2.0**-24 * magnitude
    assert np.all(np.abs(y - case.expected(truth, edit)) <= tolerance)


def test_overflow_of_the_storage_dtype(builder, truth):
    case, edit = Dense(builder, "matmul", 4, 4, np.float16), truth.edit(("lam",), 4, 4)
    edit.lam[:] = 60_000
    with pytest.raises(EditError, match="site 'fc': a value to store overflows float16; use --placement side-op"):
        rewrite(case.model, edit)
    with pytest.raises(EditError, match="site 'fc': a value to store overflows float16; use a float32 base graph"):
        rewrite(case.model, type(edit)(lam=np.float32([1, 1, 1, 1e6])), "side-op")
    y = run(rewrite(case.model, edit, "side-op")[0], x=case.x)
    tolerance = truth.tolerance(case.expected(truth, edit, absolute=True), np.float16)
    assert np.all(np.abs(y - case.expected(truth, edit)) <= tolerance)


def test_require_fold(builder, truth):
    grouped = Conv(builder, np.float32, **CONVS["groups"])
    with pytest.raises(PlanError, match="site 'fc' cannot fold: low rank before a grouped convolution; drop --require"):
        rewrite(grouped.model, truth.edit(("lorfa",), 4, 6), require_fold=True)
    _, plan = rewrite(grouped.model, truth.edit(("lam", "delta"), 4, 6), require_fold=True)
    assert plan.count(OWN_WEIGHT) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_costs_are_what_the_graph_gains(builder, truth, dtype):
    """``extra_bytes`` against the initializers that the rewrite added."""

    def weight_bytes(model):
        return sum(v.const_value.nbytes for v in model.graph.initializers.values())

    for op in OPS:
        for parts in EDITS:
            for placement in ("auto", "side-op"):
                case = Dense(builder, op, 5, 3, dtype)
                rewritten, plan = rewrite(case.model, truth.edit(parts, 5, 3), placement)
                assert plan.extra_bytes == weight_bytes(rewritten) - weight_bytes(case.model), (op, parts, placement)


def test_sites_know_their_axis(builder):
    for op in OPS:
        site = find_sites(Dense(builder, op, 5, 3, np.float32).model)["fc"]
        assert (site.in_features, site.out_features) == (5, 3)
        assert site.constant_weight().shape == (3, 5)
    site = find_sites(Conv(builder, np.float32, **CONVS["groups"]).model)["fc"]
    assert (site.in_features, site.out_features, site.groups, site.kernel) == (4, 6, 2, (3,))
