"""Tensors that several nodes read, and sites at the edges of the graph: what must not be touched, and what must."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.errors import PlanError, SiteError
from deployfa.graph import apply_adapter, find_sites, make_plan
from deployfa.graph.evaluate import evaluate

RNG = np.random.default_rng(5)
W, W2 = (RNG.standard_normal((4, 4)).astype(np.float32) for _ in range(2))
C = RNG.standard_normal(4).astype(np.float32)
X = RNG.standard_normal((3, 4)).astype(np.float32)
PLACEMENTS = ["auto", "side-op"]


def rewrite(model, edits, placement="auto", modules=None):
    adapter = Adapter("vefa", edits, modules or {})
    plan = make_plan(model, adapter, placement=placement)
    rewritten = apply_adapter(model, adapter, plan)
    onnx.checker.check_model(ir.to_proto(rewritten), full_check=True)
    return rewritten, {edit.site: edit for edit in plan.edits}


def outputs(model, **feeds):
    return list(evaluate(model, [feeds or {"x": X}])[0].values())


def equal(truth, actual, edit, w, c=None, x=X, **how):
    expected = truth.dense(edit, w, c, x, **how)
    tolerance = truth.tolerance(truth.dense(edit, w, c, x, absolute=True, **how), np.float32)
    return bool(np.all(np.abs(actual - expected) <= tolerance))


@pytest.fixture
def all_parts(truth):
    return truth.edit(truth.PARTS, 4, 4, seed=1), truth.edit(truth.PARTS, 4, 4, seed=2)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("adapted", [("a",), ("b",), ("a", "b")])
def test_two_sites_that_share_weight_and_bias(builder, truth, all_parts, placement, adapted):
    g = builder()
    x, w, c = g.input("x", 3, 4), g.const("w", W.T), g.const("c", C)
    ya = g.op("Add", g.op("MatMul", x, w, site="a"), c, site="a", out="ya")
    yb = g.op("Add", g.op("MatMul", x, w, site="b"), c, site="b", out="yb")
    model = g.model(ya, yb)
    edits = dict(zip("ab", all_parts, strict=True))
    rewritten, planned = rewrite(model, {site: edits[site] for site in adapted}, placement)
    for site, y in zip("ab", outputs(rewritten), strict=True):
        assert equal(truth, y, edits[site] if site in adapted else Edit(), W, C)
    if placement == "auto":
        assert all("its own copy, the initializer is shared" in edit.reason for edit in planned.values())
        # the last of two that leave takes the old one over
        assert len(rewritten.graph.initializers) == 4
    assert all(equal(truth, y, Edit(), W, C) for y in outputs(model))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_module_that_is_called_twice(builder, truth, all_parts, placement):
    g = builder()
    x, w, c = g.input("x", 3, 4), g.const("w", W.T), g.const("c", C)
    for _ in range(2):
        x = g.op("Tanh", g.op("Add", g.op("MatMul", x, w, site="a"), c, site="a"))
    rewritten, planned = rewrite(g.model(g.op("Identity", x, out="y")), {"a": all_parts[0]}, placement)
    assert planned["a"].uses == 2
    h = np.tanh(truth.dense(all_parts[0], W, C, X))
    expected = np.tanh(truth.dense(all_parts[0], W, C, h))
    # tanh has slope ≤ 1: the first call's error reaches the end through |W| |T|, the second adds its own
    first = truth.tolerance(truth.dense(all_parts[0], W, C, X, absolute=True), np.float32)
    gain = truth.dense(all_parts[0], W, None, first, absolute=True) - truth.dense(
        all_parts[0], W, None, np.zeros_like(first), absolute=True
    )
    second = truth.tolerance(truth.dense(all_parts[0], W, C, h, absolute=True), np.float32)
    assert np.all(np.abs(outputs(rewritten)[0] - expected) <= gain + second)


def test_a_module_with_two_weights_or_two_ways_to_read_one_is_no_site(builder):
    g = builder()
    x, w, other = g.input("x", 3, 4), g.const("w", W), g.const("other", W2)
    y = [
        g.op("MatMul", g.op("MatMul", x, w, site="two weights"), other, site="two weights"),
        g.op("Gemm", g.op("Gemm", x, w, site="both ways", transB=1), w, site="both ways", transB=0),
        g.op("Gemm", g.op("Gemm", x, w, site="two α"), w, site="two α", alpha=2.0),
        g.op("MatMul", g.op("MatMul", x, w, site="turned"), g.op("Transpose", w, perm=[1, 0]), site="turned"),
        g.op("MatMul", x, w, site="site"),
        g.op("MatMul", g.op("MatMul", x, w, site="same"), g.op("Identity", w), site="same"),
    ]
    assert list(find_sites(g.model(*y))) == ["site", "same"]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_weight_tied_to_the_embedding(builder, truth, all_parts, placement):
    g = builder()
    table, ids = g.const("table", W), g.input("ids", 3, dtype=ir.DataType.INT64)
    e = g.op("Gather", table, ids, site="emb", out="e")
    model = g.model(e, g.op("Gemm", e, table, site="head", transB=1, out="y"))
    rewritten, planned = rewrite(model, {"head": all_parts[0]}, placement)
    assert planned["head"].placement == "side op"
    assert placement == "side-op" or planned["head"].reason == "weight is tied to the embedding"
    picked = np.array([3, 0, 2])
    embedded, y = outputs(rewritten, ids=picked)
    assert np.array_equal(embedded, W[picked].astype(np.float64))
    assert equal(truth, y, all_parts[0], W, x=W[picked])


@pytest.mark.parametrize("default", [None, W.T])
def test_a_weight_that_is_a_graph_input(builder, truth, all_parts, default):
    g = builder()
    x, w = g.input("x", 3, 4), g.input("w", 4, 4, default=default)
    rewritten, planned = rewrite(g.model(g.op("MatMul", x, w, site="a", out="y")), {"a": all_parts[0]})
    assert (planned["a"].placement, planned["a"].reason) == ("side op", "weight is a graph input")
    assert equal(truth, outputs(rewritten, x=X, w=W2.T)[0], all_parts[0], W2)


@pytest.mark.parametrize("default", [None, C])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_bias_that_is_a_graph_input(builder, truth, all_parts, op, default):
    """Whoever feeds the bias must not lose δ."""
    g = builder()
    x, w, c = g.input("x", 3, 4), g.const("w", W.T), g.input("c", 4, default=default)
    if op == "Gemm":
        y = g.op("Gemm", x, w, c, site="a", out="y")
    else:
        y = g.op("Add", g.op("MatMul", x, w, site="a"), c, site="a", out="y")
    rewritten, _ = rewrite(g.model(y), {"a": all_parts[0]})
    for fed in (C, C[::-1] * 2):
        assert equal(truth, outputs(rewritten, x=X, c=fed)[0], all_parts[0], W, fed)


def test_a_bias_that_is_computed_or_differs_by_position(builder, truth, all_parts):
    g = builder()
    x, w, c = g.input("x", 3, 4), g.const("w", W.T), g.const("c", C)
    table = RNG.standard_normal((3, 4)).astype(np.float32)
    computed = g.op("Gemm", x, w, g.op("Neg", c), site="a", out="ya")
    by_position = g.op("Add", g.op("MatMul", x, w, site="b"), g.const("table", table), site="b", out="yb")
    model = g.model(computed, by_position)
    rewritten, planned = rewrite(model, dict(zip("ab", all_parts, strict=True)))
    assert [planned[s].reason for s in "ab"] == ["bias is computed in the graph", "bias differs by position"]
    ya, yb = outputs(rewritten)
    assert equal(truth, ya, all_parts[0], W, -C) and equal(truth, yb, all_parts[1], W, table)


@pytest.mark.parametrize("shape", [(1, 4), (1,), ()])
def test_biases_of_other_shapes(builder, truth, all_parts, shape):
    c = np.broadcast_to(C[:1] if shape != (1, 4) else C, shape if shape else (1,)).reshape(shape)
    for op in ("Gemm", "MatMul"):
        g = builder()
        x, w, operand = g.input("x", 3, 4), g.const("w", W.T), g.const("c", c)
        if op == "Gemm":
            y = g.op("Gemm", x, w, operand, site="a", out="y")
        else:
            y = g.op("Add", g.op("MatMul", x, w, site="a"), operand, site="a", out="y")
        rewritten, planned = rewrite(g.model(y), {"a": all_parts[0]})
        assert planned["a"].placement == "own weight"
        assert equal(truth, outputs(rewritten)[0], all_parts[0], W, np.broadcast_to(c, 4) if shape != (1, 4) else C)


def test_an_addition_of_another_module_is_no_bias(builder, truth, all_parts):
    g = builder()
    x, c = g.input("x", 3, 4), g.const("c", C)
    y = g.op("Add", g.op("MatMul", x, g.const("w", W.T), site="a"), c, site="parent", out="y")
    rewritten, _ = rewrite(g.model(y, g.op("Add", x, c, out="z")), {"a": all_parts[0]})
    y, z = outputs(rewritten)
    assert equal(truth, y, all_parts[0], W, C)
    assert np.array_equal(z, X.astype(np.float64) + C)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_output_that_others_read_before_the_bias(builder, truth, all_parts, placement):
    """The product is a graph output of its own and has two readers: the change must reach all three."""
    g = builder()
    x = g.input("x", 3, 4)
    product = g.op("MatMul", x, g.const("w", W.T), site="a", out="product")
    model = g.model(
        product,
        g.op("Neg", product, out="neg"),
        g.op("Gemm", product, g.const("w2", W2), g.const("c", C), site="b", transB=1, out="y"),
    )
    for edits in ({"a": all_parts[0]}, {"a": all_parts[0], "b": all_parts[1]}, {"b": all_parts[1], "a": all_parts[0]}):
        rewritten, _ = rewrite(model, edits, placement)
        assert [value.name for value in rewritten.graph.outputs] == ["product", "neg", "y"]
        product_, neg, y = outputs(rewritten)
        assert equal(truth, product_, all_parts[0], W) and np.array_equal(neg, -product_)
        assert equal(truth, y, edits.get("b", Edit()), W2, C, x=product_)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_chain_of_sites_in_either_order(builder, truth, all_parts, placement, reverse):
    g = builder()
    h = g.op("MatMul", g.input("x", 3, 4), g.const("w", W.T), site="a", out="h")
    model = g.model(h, g.op("MatMul", h, g.const("w2", W2.T), site="b", out="y"))
    order = list(zip("ab", all_parts, strict=True))
    rewritten, _ = rewrite(model, dict(order[::-1] if reverse else order), placement)
    h, y = outputs(rewritten)
    assert equal(truth, h, all_parts[0], W) and equal(truth, y, all_parts[1], W2, x=h)


def test_equal_edits_of_one_input_share_their_nodes(builder, truth):
    edit, other = truth.edit(("lam", "lorfa", "delta"), 4, 4), truth.edit(("lam", "lorfa", "delta"), 4, 4, seed=9)
    g = builder()
    x = g.op("Relu", g.input("x", 3, 4))
    sites = ["q", "k", "v"]
    model = g.model(*[g.op("MatMul", x, g.const(f"{s}.w", W.T), site=s, out=s) for s in sites])
    copy = Edit(**{name: getattr(edit, name) for name in ("lam", "input_low_rank", "delta")})
    shared, _ = rewrite(model, {"q": edit, "k": copy, "v": edit}, "side-op")
    assert len(shared.graph) == len(model.graph) + 5  # Mul, MatMul, MatMul, Add, Add
    mixed, _ = rewrite(model, {"q": edit, "k": other, "v": edit}, "side-op")
    assert len(mixed.graph) == len(model.graph) + 10
    x = np.maximum(X, 0)
    assert all(equal(truth, y, edit, W, x=x) for y in outputs(shared))
    assert [equal(truth, y, edit, W, x=x) for y in outputs(mixed)] == [True, False, True]
    assert equal(truth, outputs(mixed)[1], other, W, x=x)


def test_almost_equal_edits_do_not_share(builder, truth):
    one = truth.edit(("lam",), 4, 4)
    two = Edit(lam=np.nextafter(one.lam, np.float32(9)))
    g = builder()
    x = g.input("x", 3, 4)
    model = g.model(*[g.op("MatMul", x, g.const(f"{s}.w", W.T), site=s, out=s) for s in "ab"])
    rewritten, _ = rewrite(model, {"a": one, "b": two}, "side-op")
    assert len(rewritten.graph) == 4
    assert not np.array_equal(*outputs(rewritten))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_names_that_are_taken(builder, truth, all_parts, placement):
    """Initializers that are called what a placement would call its own."""
    g = builder()
    x = g.input("x", 3, 4)
    for name in ("a/scale", "a/shift", "a/lorfa_A", "a/lora_B", "a.bias", "a.weight", "a.bias.1"):
        g.op("Add", x, g.const(name, np.full(4, 7.0)))
    w = g.const("w", W.T)
    ys = [g.op("MatMul", x, w, site=s, out=f"y{s}") for s in "ab"]
    keep = [g.op("Identity", i, out=f"keep_{n}") for n, i in enumerate(g.initializers[:-1])]
    rewritten, _ = rewrite(g.model(*ys, *keep), {"a": all_parts[0]}, placement)
    ya, yb, *kept = outputs(rewritten)
    assert equal(truth, ya, all_parts[0], W) and equal(truth, yb, Edit(), W)
    assert all(np.array_equal(array, np.full(4, 7.0)) for array in kept)


def branches(builder):
    """``y = if c: x W else: -x`` with the weight's node inside the branch."""
    g = builder()
    inner = builder()
    x, w = g.input("x", 3, 4), g.const("w", W.T)
    cond = g.input("cond", dtype=ir.DataType.BOOL)
    inside = inner.op("MatMul", x, w, site="a", out="then")
    negative = builder()
    negative.op("Neg", x, out="else")
    graphs = [
        ir.Graph([], [b.nodes[-1].outputs[0]], nodes=b.nodes, name=f"branch{i}", opset_imports={"": 20})
        for i, b in enumerate((inner, negative))
    ]
    for graph in graphs:
        graph.outputs[0].shape = ir.Shape((3, 4))
    assert inside.producer().graph is graphs[0]
    y = g.op("If", cond, then_branch=graphs[0], else_branch=graphs[1])
    return g.model(g.op("MatMul", y, g.const("w2", W2.T), site="b", out="y"))


def test_a_site_inside_a_branch_is_refused(builder, truth):
    model = branches(builder)
    with pytest.raises(SiteError, match="site 'a' not found; sites in this graph: b"):
        make_plan(model, Adapter("vefa", {"a": truth.edit(("lam",), 4, 4)}))
    rewritten, _ = rewrite(model, {"b": truth.edit(("lam",), 4, 4)})
    (y,) = outputs(rewritten, x=X, cond=np.array(False))
    assert equal(truth, y, truth.edit(("lam",), 4, 4), W2, x=-X)


def test_a_site_that_also_runs_inside_a_branch_is_refused(builder):
    """Whatever operator runs it: an edit cannot follow it there."""
    g, inner = builder(), builder()
    x, w = g.input("x", 3, 4, 2), g.const("w", W[..., None])
    y = g.op("ConvTranspose", x, w, site="a", out="y")
    then = inner.op("ConvTranspose", x, w, site="a", out="then")
    then.shape = ir.Shape((3, 4, 2))
    branch = [ir.Graph([], [then], nodes=inner.nodes, name="then", opset_imports={"": 20})]
    other = builder()
    other.op("Neg", x, out="else").shape = ir.Shape((3, 4, 2))
    branch.append(ir.Graph([], [other.nodes[0].outputs[0]], nodes=other.nodes, name="else", opset_imports={"": 20}))
    z = g.op("If", g.input("cond", dtype=ir.DataType.BOOL), then_branch=branch[0], else_branch=branch[1], out="z")
    with pytest.raises(SiteError, match="site 'a' not found"):
        make_plan(g.model(y, z), Adapter("vefa", {"a": Edit(lam=W[0])}))


def test_an_empty_edit_changes_nothing(builder, as_bytes):
    g = builder()
    model = g.model(g.op("MatMul", g.input("x", 3, 4), g.const("w", W.T), site="a", out="y"))
    rewritten, _ = rewrite(model, {"a": Edit()})
    assert as_bytes(rewritten) == as_bytes(model)


def test_a_fresh_adapter_leaves_the_base_bit_for_bit(builder, truth):
    fresh = truth.edit(("lam", "lorfa"), 4, 4)
    fresh.lam[:] = 0
    fresh.input_low_rank.b[:] = 0
    g = builder()
    y = g.op("Gemm", g.input("x", 3, 4), g.const("w", W.T), g.const("c", C), site="a", out="y")
    model = g.model(y)
    rewritten, _ = rewrite(model, {"a": fresh})
    for name, value in model.graph.initializers.items():
        assert rewritten.graph.initializers[name].const_value.numpy().tobytes() == value.const_value.numpy().tobytes()


def test_graphs_without_module_paths_and_with_odd_ones(builder):
    g = builder()
    plain = g.model(g.op("MatMul", g.input("x", 3, 4), g.const("w", W.T), out="y"))
    with pytest.raises(SiteError, match=r"carries no module paths.*; export it with deployfa export"):
        find_sites(plain)
    g = builder()
    x, w = g.input("x", 3, 4), g.const("w", W.T)
    y = [g.op("MatMul", x, w, site="site")]
    for text in (
        "",
        "[",
        "1",
        "[]",
        "['a']",
        "__import__('os').getcwd()",
        "-" * 10**5 + "1",
        "(" * 10**4,
        "[[1], 'x']",
    ):
        y.append(g.op("MatMul", x, w))
        y[-1].producer().metadata_props["pkg.torch.onnx.name_scopes"] = text
    model = g.model(*y)
    assert next(iter(find_sites(model))) == "site"
    with pytest.raises(PlanError, match="cannot fold: asked for with --placement side-op"):
        make_plan(model, Adapter("vefa", {"site": Edit()}), placement="side-op", require_fold=True)
