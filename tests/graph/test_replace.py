"""Replaced modules: the head goes where PyTorch's head is, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.errors import EditError, SiteError
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate

RNG = np.random.default_rng(6)
OLD, NEW = (RNG.standard_normal((4, 4)).astype(np.float32) for _ in range(2))
OLD_C, NEW_C = (RNG.standard_normal(4).astype(np.float32) for _ in range(2))
X = RNG.standard_normal((3, 4)).astype(np.float32)
HEAD = {"weight": NEW, "bias": NEW_C}
FORMS = ["matmul", "matmul no bias", "gemm dk", "gemm kd", "gemm dk no bias", "gemm β", "conv"]


def graph(builder, form, *, w=OLD, c=OLD_C, name=None):
    """A head as each exporter leaves it, beside another site that reads the same tensors."""
    g = builder()
    x = g.input("x", *(X.shape if form != "conv" else (3, 4, 1)))
    if form.startswith("matmul"):
        weight, bias = g.const(name or "head.weight.T", w.T), g.const("head.bias", c)

        def layer(site):
            y = g.op("MatMul", x, weight, site=site)
            return y if "no bias" in form else g.op("Add", y, bias, site=site)
    elif form == "conv":
        weight, bias = g.const("head.weight", w[..., None]), g.const("head.bias", c)

        def layer(site):
            return g.op("Conv", x, weight, bias, site=site, kernel_shape=[1])
    else:
        weight, bias = g.const(name or "head.weight", w.T if "kd" in form else w), g.const("head.bias", c)
        how = {"transB": 0 if "kd" in form else 1, **({"beta": 0.5} if "β" in form else {})}

        def layer(site):
            return g.op("Gemm", x, weight, *([] if "no bias" in form else [bias]), site=site, **how)

    return g.model(*[g.op("Identity", layer(site), out=f"y_{site}") for site in ("head", "other")])


def apply(model, adapter, placement="auto"):
    rewritten = apply_adapter(model, adapter, make_plan(model, adapter, placement=placement))
    onnx.checker.check_model(ir.to_proto(rewritten), full_check=True)
    return rewritten


def run(model, form):
    x = X[..., None] if form == "conv" else X
    return [y.reshape(3, 4) for y in evaluate(model, [{"x": x}])[0].values()]


def equal(truth, y, w, c, edit=None, **how):
    edit = edit or Edit()
    tolerance = truth.tolerance(truth.dense(edit, w, c, X, absolute=True, **how), np.float32)
    return bool(np.all(np.abs(y - truth.dense(edit, w, c, X, **how)) <= tolerance))


@pytest.mark.parametrize("form", FORMS)
def test_a_square_head_is_replaced_the_right_way_round_and_its_twin_is_not(builder, truth, form):
    model = graph(builder, form)
    stored = NEW.T if form == "gemm kd" else NEW  # GPT-2's Conv1D keeps (k, d) in PyTorch too
    weight = stored[..., None] if form == "conv" else stored
    head, other = run(apply(model, Adapter("head", {}, {"head": {"weight": weight, "bias": NEW_C}})), form)
    how = {"beta": 0.5} if form == "gemm β" else {}
    assert equal(truth, head, NEW, NEW_C, **how)
    assert not equal(truth, head, NEW.T, NEW_C, **how)
    assert equal(truth, other, OLD, None if "no bias" in form else OLD_C, **how)
    assert all(equal(truth, y, OLD, None if "no bias" in form else OLD_C, **how) for y in run(model, form))


@pytest.mark.parametrize("placement", ["auto", "side-op"])
@pytest.mark.parametrize("form", FORMS)
def test_an_edit_of_a_replaced_head_changes_the_new_weights(builder, truth, form, placement):
    edit = truth.edit(("lam", "delta", "lorfa"), 4, 4)
    stored = NEW.T if form == "gemm kd" else NEW
    weight = stored[..., None] if form == "conv" else stored
    adapter = Adapter("vefa", {"head": edit}, {"head": {"weight": weight, "bias": NEW_C}})
    how = {"beta": 0.5} if form == "gemm β" else {}
    head, other = run(apply(graph(builder, form), adapter, placement), form)
    assert equal(truth, head, NEW, NEW_C, edit, **how)
    assert equal(truth, other, OLD, None if "no bias" in form else OLD_C, **how)


def test_a_weight_alone_keeps_the_bias_and_the_other_way_round(builder, truth):
    model = graph(builder, "matmul")
    assert equal(truth, run(apply(model, Adapter("head", {}, {"head": {"weight": NEW}})), "matmul")[0], NEW, OLD_C)
    assert equal(truth, run(apply(model, Adapter("head", {}, {"head": {"bias": NEW_C}})), "matmul")[0], OLD, NEW_C)


@pytest.mark.parametrize("form", ["matmul", "gemm kd"])
def test_a_name_that_does_not_say_which_way_the_weight_lies(builder, form):
    """A graph from torch.onnx.export alone calls it val_3; a square weight would go in either way round."""
    model = graph(builder, form, name="val_3")
    with pytest.raises(SiteError, match="does not say which way its square weight lies; export the base graph with"):
        apply(model, Adapter("head", {}, {"head": HEAD}))


def test_another_number_of_labels(builder):
    model = graph(builder, "matmul")
    wide, long = np.ones((5, 4), np.float32), np.ones(5, np.float32)
    for parameters in ({"weight": wide}, {"bias": long}, {"weight": wide, "bias": long}, {"bias": np.ones((1, 4))}):
        with pytest.raises(EditError, match="another number of labels"):
            apply(model, Adapter("head", {}, {"head": parameters}))


def test_parameters_that_the_graph_lacks_or_that_are_not_finite(builder):
    model = graph(builder, "matmul")
    with pytest.raises(SiteError, match=r"module 'head' has no parameter 'gamma'.*; the base model is another one"):
        apply(model, Adapter("head", {}, {"head": {"gamma": NEW_C}}))
    with pytest.raises(SiteError, match=r"site 'classifier' not found; sites in this graph: head, other"):
        apply(model, Adapter("head", {}, {"classifier": HEAD}))
    with pytest.raises(EditError, match="NaN or infinite"):
        apply(model, Adapter("head", {}, {"head": {"weight": NEW, "bias": NEW_C * np.nan}}))


def norms(builder, *paths):
    """LayerNorms at their start values, which the exporter merges into the first one's initializers."""
    g = builder()
    x, scale, shift = g.input("x", 3, 4), g.const("n.weight", np.ones(4)), g.const("n.bias", np.zeros(4))
    ys = []
    for i, path in enumerate(paths):
        scaled = g.op("Mul", x, scale, site=path)
        ys.append(g.op("Add", scaled, shift, site=path, out=f"y{i}"))
    return g.model(*ys)


def test_merged_parameters_of_other_modules_stay(builder):
    model = norms(builder, "n", "m", "n.inner")
    new = {"weight": np.arange(4, dtype=np.float32), "bias": NEW_C}
    y, other, inner = evaluate(apply(model, Adapter("head", {}, {"n": new})), [{"x": X}])[0].values()
    want = X.astype(np.float64) * new["weight"] + NEW_C
    assert np.array_equal(y, want) and np.array_equal(inner, want) and np.array_equal(other, X)
    with pytest.raises(SiteError, match="read by nodes of other modules only"):
        apply(norms(builder, "m", "k"), Adapter("head", {}, {"n": new}))
    with pytest.raises(EditError, match="another number of labels"):
        apply(model, Adapter("head", {}, {"n": {"weight": np.ones(5)}}))


def test_the_callers_head_and_graph_stay(builder, as_bytes):
    for form in FORMS:
        model = graph(builder, form)
        parameters = {"weight": (NEW[..., None] if form == "conv" else NEW).copy(), "bias": NEW_C.copy()}
        for array in parameters.values():
            array.flags.writeable = False
        before = as_bytes(model), [a.tobytes() for a in parameters.values()]
        apply(model, Adapter("head", {}, {"head": parameters}))
        assert (as_bytes(model), [a.tobytes() for a in parameters.values()]) == before
