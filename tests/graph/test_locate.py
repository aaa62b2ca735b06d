"""Sites by the evidence that a graph from elsewhere has: names, biases, scopes of nodes, the weights themselves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.errors import BaseMismatchError, SiteError
from deployfa.graph import find_sites
from deployfa.graph.locate import locate_sites
from deployfa.naming import same_path


def stack(builder, layers, *, gemm=False):
    """Layers one after the other: (name of the weight, W (d, k), name of the bias or None, name of the node)."""
    g = builder()
    value, biases = g.input("x", 2, layers[0][1].shape[1]), {}
    for number, (weight, w, bias, node) in enumerate(layers):
        if gemm:
            value = g.op("Gemm", value, g.const(weight, w), transB=1, out=f"y{number}")
        else:
            value = g.op("MatMul", value, g.const(weight, w.T), out=f"p{number}")
        g.nodes[-1].name = node
        if bias is not None:
            if bias not in biases:
                biases[bias] = g.const(bias, np.zeros(w.shape[0]))
            value = g.op("Add", value, biases[bias], out=f"y{number}")
        elif not gemm:
            value.name = f"y{number}"
    return g.model(value)


@pytest.fixture
def w():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((4, 4)).astype(np.float32) for _ in range(4)]


def how(model, wanted, **options):
    _, located = locate_sites(model, dict.fromkeys(wanted, (4, -1)), **options)
    return {each.site: (each.how, each.weight, *each.nodes) for each in located}


def test_same_path():
    names = {"bert.a.fc", "h.1.fc", "h.10.fc", "dense", "0.auto_model.e.layer.0.q"}
    assert same_path("bert.a.fc", names) == ["bert.a.fc"]
    assert same_path("a.fc", names) == ["bert.a.fc"]
    # the longer name is not the better one: two layers of a stack
    assert same_path("1.fc", names) == ["h.1.fc"]
    assert same_path("fc", names) == ["bert.a.fc", "h.1.fc", "h.10.fc"]
    assert same_path("model.bert.a.fc", names) == ["bert.a.fc"]
    # a name that says less about the place than the site does is any layer's
    assert same_path("encoder.layer.0.output.dense", names) == []
    assert same_path("pooler.dense", names) == ["dense"]
    assert same_path("e.layer.0.q", names) == ["0.auto_model.e.layer.0.q"]
    assert same_path("0.e.layer.0.q", {"e.layer.0.q"}) == ["e.layer.0.q"]
    assert same_path("cfc", {"fc"}) == same_path("fc", {"cfc"}) == []


def test_names_of_parameters(builder, w):
    suffixes = (
        ".weight",
        ".weight.T",
        ".weight_quantized",
        ".weight.T_Q4",
        ".qweight",
        ".weight_DQ_Q4",
        ".weight_fp16",
    )
    for suffix in suffixes:
        found = how(stack(builder, [(f"m.fc{suffix}", w[0], None, "n0"), ("other", w[1], None, "n1")]), ["fc"])
        assert found == {"fc": ("initializer name 'm.fc'", f"m.fc{suffix}", "n0")}


def test_evidence_in_order(builder, w):
    """A name that says nothing is passed over for one that does; the first that does is believed."""
    model = stack(
        builder,
        [
            ("a.weight", w[0], None, "/wrong/MatMul"),
            ("onnx::MatMul_7", w[1], "b.bias", "/wrong/MatMul_1"),
            ("onnx::MatMul_8", w[2], None, "/model/c/MatMul"),
            ("onnx::MatMul_9", w[3], "zero", "n3"),
        ],
    )
    assert how(model, ["a", "b", "c"]) == {
        "a": ("initializer name 'a'", "a.weight", "/wrong/MatMul"),
        "b": ("bias name 'b'", "onnx::MatMul_7", "/wrong/MatMul_1"),
        "c": ("node name 'model.c'", "onnx::MatMul_8", "/model/c/MatMul"),
    }
    with pytest.raises(
        SiteError, match=r"site 'd' not found; nearest layers of its size: .*'onnx::MatMul_9' \(MatMul, 4→4"
    ):
        how(model, ["d"])
    assert how(model, ["d"], base={"d": lambda: w[3]})["d"][0] == "comparing weights: 'onnx::MatMul_9'"
    # what was found becomes the graph's own module paths; the model that was given has none
    located, _ = locate_sites(model, {"c": None})
    assert set(find_sites(located)) == {"c"}
    with pytest.raises(SiteError, match="no module paths"):
        find_sites(model)


def test_a_merged_bias_names_many_layers(builder, w):
    """Exporters make one tensor of equal biases, called after the first: the node's name still tells the first."""
    layers = [("onnx::MatMul_1", w[0], "a.bias", "/a/MatMul"), ("onnx::MatMul_2", w[1], "a.bias", "/b/MatMul")]
    assert how(stack(builder, layers), ["a", "b"]) == {
        "a": ("node name 'a'", "onnx::MatMul_1", "/a/MatMul"),
        "b": ("node name 'b'", "onnx::MatMul_2", "/b/MatMul"),
    }
    unnamed = stack(builder, [(weight, array, bias, f"n{n}") for n, (weight, array, bias, _) in enumerate(layers)])
    with pytest.raises(
        SiteError, match="'a' fits several layers by bias name: onnx::MatMul_1, onnx::MatMul_2; name one"
    ):
        how(unnamed, ["a"])
    assert how(unnamed, ["a"], base={"a": lambda: w[0]})["a"] == (
        "comparing weights: 'onnx::MatMul_1'",
        "onnx::MatMul_1",
        "n0",
    )


def test_several_layers_of_a_stack(builder, w):
    model = stack(builder, [("h.1.fc.weight", w[0], None, "n0"), ("h.10.fc.weight", w[1], None, "n1")])
    with pytest.raises(
        SiteError, match=r"'fc' fits several layers by initializer name: h\.1\.fc\.weight, h\.10\.fc\.weight;"
    ):
        how(model, ["fc"])
    assert how(model, ["fc"], base={"fc": lambda: w[1]})["fc"][1] == "h.10.fc.weight"
    assert how(model, ["fc"], named={"fc": "n0"})["fc"] == ("--sites: 'n0'", "h.1.fc.weight", "n0")
    less = stack(builder, [("dense.weight", w[0], None, "n0"), ("other", w[1], None, "n1")])
    with pytest.raises(SiteError, match=r"site 'layer\.0\.output\.dense' not found; .*'dense\.weight' \(MatMul, 4→4\)"):
        how(less, ["layer.0.output.dense"])


@pytest.mark.parametrize("gemm", [False, True])
def test_a_square_weight_in_either_orientation(gemm, builder, w):
    """A checkpoint may hold (k, d), as GPT-2's does; the shape of a square one does not say so."""
    model = stack(builder, [("w0", w[0], None, "n0"), ("w1", w[1], None, "n1")], gemm=gemm)
    for base in (w[1], w[1].T):
        assert how(model, ["a"], base={"a": lambda base=base: base})["a"][1:] == ("w1", "n1")
    with pytest.raises(SiteError, match="not found"):
        how(model, ["a"], base={"a": lambda: w[1][::-1]})


def test_weights_that_were_rounded_or_quantised(builder, w):
    """A rounded copy is the same weight; a quantised one is nearer than any other layer; another layer is neither."""
    half = stack(builder, [("w0", w[0].astype(np.float16), None, "n0"), ("w1", w[1], None, "n1")])
    assert how(half, ["a"], base={"a": lambda: w[1].astype(np.float16)})["a"][1] == "w1"
    g = builder()
    x, integers = g.input("x", 2, 4), []
    for number, array in enumerate(w[:2]):
        scale = np.abs(array).max() / 7
        q = g.const(f"q{number}", np.rint(array.T / scale).astype(np.int8))
        integers.append(g.op("DequantizeLinear", q, g.const(f"s{number}", np.array(scale)), out=f"d{number}"))
    x = g.op("MatMul", g.op("MatMul", x, integers[0], out="y0"), integers[1], out="y1")
    model = g.model(x)
    for number in (0, 1):
        assert how(model, ["a"], base={"a": lambda number=number: w[number]})["a"][1] == f"q{number}"
    with pytest.raises(SiteError, match="site 'a' not found"):
        how(model, ["a"], base={"a": lambda: w[2]})
    with pytest.raises(
        BaseMismatchError, match="'a' was found by --sites: 'q0', but its weight is not the base model's"
    ):
        how(model, ["a"], named={"a": "q0"}, base={"a": lambda: w[1]})


def test_shapes_are_inferred_where_they_were_left_out(builder, w):
    model = stack(builder, [("a.weight", w[0], "a.bias", "n0"), ("b.weight", w[1], None, "n1")])
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    located, _ = locate_sites(model, {"a": None})
    assert all(value.shape is not None for node in located.graph for value in node.outputs)
    assert any(value.shape is None for node in model.graph for value in node.outputs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_shapes_after_an_int4_layer(dtype, builder):
    """MatMulNBits is no operator of the standard, so shape inference has no rule for it and stops there."""
    g = builder(dtype)
    value = g.input("x", "batch", "tokens", 16)
    for number in range(2):
        packed = ir.tensor(np.zeros((16, 1, 8), np.uint8), name=f"q{number}")
        stored = ir.Value(name=packed.name, shape=packed.shape, type=ir.TensorType(packed.dtype), const_value=packed)
        g.initializers.append(stored)
        scale = g.const(f"s{number}", np.ones(16))
        value = g.op("MatMulNBits", g.op("Relu", value), stored, scale, K=16, N=16, bits=4, block_size=16)
        g.nodes[-1].domain = "com.microsoft"
        value.type = None
    imports = {"": 20, "com.microsoft": 1}
    graph = ir.Graph(g.inputs, [g.op("Relu", value)], nodes=g.nodes, initializers=g.initializers, opset_imports=imports)
    model = ir.Model(graph, ir_version=10)
    assert all(value.shape is None for node in graph for value in node.outputs)
    located, (first, second) = locate_sites(model, {"q0": (16, 16), "q1": (16, 16)})
    for use in (*first.uses, *second.uses):
        assert (
            [str(dim) for dim in use.input.shape] == [str(dim) for dim in use.output.shape] == ["batch", "tokens", "16"]
        )
        assert use.input.dtype == use.output.dtype == g.onnx
    assert [node.op_type for node in located.graph] == [node.op_type for node in model.graph]
    assert set(located.graph.initializers) == set(model.graph.initializers)
    assert len(located.graph.inputs) == 1


def test_a_layer_that_is_called_twice_is_one_site(builder, w):
    g = builder()
    shared = g.const("fc.weight", w[0].T)
    y = g.op("MatMul", g.op("MatMul", g.input("x", 2, 4), shared, out="y0"), shared, out="y1")
    located, (found,) = locate_sites(g.model(y), {"fc": (4, 4)})
    assert found.nodes == ["node_0", "node_1"]
    assert len(find_sites(located)["fc"].uses) == 2


def called(builder, *calls):
    """One layer after the other: (name of the weight, W (d, k), name of the node); weights of one name are one."""
    g = builder()
    value, stored = g.input("x", 2, 4), {}
    for number, (name, w, node) in enumerate(calls):
        weight = stored.setdefault(name, None) or g.const(name, w.T)
        stored[name] = weight
        value = g.op("MatMul", value, weight, out=f"y{number}")
        g.nodes[-1].name = node
    return g.model(value)


def test_calls_that_the_exporter_numbered(builder, w):
    """As the legacy exporter names them: only the first has the module's own name."""
    numbered = ["/b/fc/MatMul", "/b/fc_1/MatMul", "/b_1/fc_2/MatMul"]
    model = called(builder, *(("onnx::MatMul_1", w[0], node) for node in numbered), ("o", w[1], "/b/fc_3/MatMul"))
    for site in ("b.fc", "model.b.fc"):
        assert how(model, [site]) == {site: ("node name 'b.fc'", "onnx::MatMul_1", *numbered)}
    assert len(find_sites(locate_sites(model, {"b.fc": None})[0])["b.fc"].uses) == 3
    # without a first there is nothing to count from
    apart = called(builder, ("one", w[0], "/fc_1/MatMul"), ("one", w[0], "/fc_2/MatMul"))
    assert how(apart, ["fc_1"]) == {"fc_1": ("node name 'fc_1'", "one", "/fc_1/MatMul")}


def test_calls_with_a_copy_of_the_weight_each(builder, w):
    model = called(builder, ("one", w[0], "/fc/MatMul"), ("two", w[0], "/fc_1/MatMul"))
    with pytest.raises(SiteError, match=r"'fc' runs several times, each with its own copy of one weight \(one, two\)"):
        how(model, ["fc"])
    assert how(model, ["fc"], named={"fc": "one"})["fc"][2:] == ("/fc/MatMul",)
    apart = called(builder, ("one", w[0], "/fc/MatMul"), ("two", w[1], "/fc_1/MatMul"))
    assert how(apart, ["fc"])["fc"][2:] == ("/fc/MatMul",)


def test_two_modules_with_one_weight(builder, w):
    """Tied, or merged because equal: the weight goes by the first's name, the nodes say whose they are."""
    model = called(builder, ("a.fc.weight", w[0], "/a/fc/MatMul"), ("a.fc.weight", w[0], "/b/fc/MatMul"))
    for options in ({}, {"base": {"a.fc": lambda: w[0], "b.fc": lambda: w[0]}}):
        assert how(model, ["a.fc", "b.fc"], **options) == {
            "a.fc": ("initializer name 'a.fc'", "a.fc.weight", "/a/fc/MatMul"),
            "b.fc": ("node name 'b.fc'", "a.fc.weight", "/b/fc/MatMul"),
        }
    other = called(builder, ("a.fc.weight", w[0], "/x/fc/MatMul"), ("a.fc.weight", w[0], "/y/fc/MatMul"))
    with pytest.raises(SiteError, match=r"'a\.fc' has the weight of several modules: x\.fc, y\.fc; name the weight"):
        how(other, ["a.fc"])
