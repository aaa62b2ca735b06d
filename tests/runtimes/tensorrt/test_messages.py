"""What the parser and the builder refuse, in one line that names the node, its module, and the way out.

All of it is said by the real library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnx import NodeProto, helper

from deployfa.compile import _named, _signature
from deployfa.errors import RuntimeTargetError
from deployfa.graph.storage import save_graph
from deployfa.runtimes.tensorrt import BuildRequest, NodePlace, Sizes, build_engine
from deployfa.runtimes.tensorrt.messages import build_error

from .small import after_a_layer, layer, small_request


def refusal(request: BuildRequest, folder: Path) -> str:
    """The error of a build, which is one line and leaves no engine."""
    out = folder / "engine"
    with pytest.raises(RuntimeTargetError) as caught:
        build_engine(request, out)
    text = str(caught.value)
    assert not out.exists()
    assert "\n" not in text and len(text) < 450, text
    # neither source files of the library nor its own function names; brackets close
    for internal in ("/_src/", ".cpp:", "IBuilder::", "ITensor::", "Error Code"):
        assert internal not in text
    assert text.count("(") == text.count(")")
    return text


@pytest.mark.parametrize(
    ("nodes", "place", "reason"),
    [
        (after_a_layer("Det"), "node 'the Det' (Det, module 'block.the Det')", "it has no such operator"),
        (
            after_a_layer("Norm", domain="com.acme"),
            "node 'the Norm' (Norm, module 'block.the Norm')",
            "it has no such operator",
        ),
        (
            [layer(), helper.make_node("MatMul", ["h", "c"], ["y"], name="narrow")],
            "node 'narrow' (MatMul, module 'block.narrow')",
            "last dimension of input0 = 8 and second to last dimension of input1 = 3 but must match",
        ),
    ],
    ids=["unknown", "of another domain", "shapes"],
)
def test_an_operator_that_it_does_not_take(nodes: Sequence[NodeProto], place: str, reason: str, tmp_path: Path) -> None:
    text = refusal(small_request(tmp_path, nodes), tmp_path)
    assert text.startswith(f"tensorrt-rtx does not take {place}: ")
    assert reason in text
    assert text.endswith("; deploy this bundle with onnxruntime, or change the module that makes the node")


def test_several_are_counted_and_a_node_without_a_module_is_named(tmp_path: Path) -> None:
    nodes = [*after_a_layer("Det")[:1], *(helper.make_node("Det", ["h"], [f"y{n}"], name=f"det{n}") for n in range(3))]
    nodes.append(helper.make_node("Sum", ["y0", "y1", "y2"], ["y"], name="sum"))
    request = small_request(tmp_path, nodes, nodes=[NodePlace(node.name, node.op_type) for node in nodes])
    assert refusal(request, tmp_path).startswith("tensorrt-rtx does not take node 'det0' (Det) and 2 more: ")


def test_the_module_is_that_of_the_exporters_scopes(tmp_path: Path) -> None:
    """As ``compile`` reads them."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Unique", [x], num_outputs=1, name="odd")
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'encoder.pick', 'unique']"
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["found"])
    graph = ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 20}, name="g")
    model = ir.Model(graph, ir_version=10)
    nodes = _named(model)
    request = small_request(tmp_path, graph=str(save_graph(model, tmp_path)), inputs=_signature([x]), nodes=nodes)
    assert "does not take node 'odd' (Unique, module 'encoder.pick'): " in refusal(request, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "text", "cut"])
def test_a_file_that_is_no_graph(content: bytes | None, tmp_path: Path) -> None:
    request = small_request(tmp_path)
    file = Path(request.graph)
    file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    assert refusal(request, tmp_path).endswith("export the bundle again")


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "gone"])
def test_weights_that_are_not_there(cut: bool, tmp_path: Path) -> None:
    request = small_request(tmp_path)
    file = tmp_path / "small.onnx.data"
    if cut:
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    text = refusal(request, tmp_path)
    assert text.startswith("tensorrt-rtx does not read the graph (") and "initializer: w)" in text
    assert text.endswith("export the bundle again")


@pytest.mark.parametrize(
    ("options", "wanted", "hint"),
    [
        (
            {"compute_capabilities": ["7.5"]},
            "of node 'layer' (MatMul, module 'block.layer'): Myelin (Cannot compile operation 'layer' for Turing",
            "build float32 for compute capability 8.0 or newer, or pass --precision fp16",
        ),
        ({"compute_capabilities": ["9.0"]}, "does not build for compute capability 9.0", "12.1"),
        ({"workspace_bytes": 1}, "within workspace limit", "leave out --workspace, or give it more"),
    ],
    ids=["an old GPU", "a GPU that it has not", "no memory"],
)
def test_what_the_builder_cannot(options: dict[str, Any], wanted: str, hint: str, tmp_path: Path) -> None:
    text = refusal(small_request(tmp_path, **options), tmp_path)
    assert wanted in text
    assert text.endswith(hint)


def test_sizes_that_do_not_go_with_the_graph(tmp_path: Path) -> None:
    nodes = [layer(), helper.make_node("Add", ["h", "c"], ["y"], name="add three")]
    text = refusal(small_request(tmp_path, nodes, profile={"batch": Sizes(4, 5, 6)}), tmp_path)
    assert "node 'add three' (Add, module 'block.add three')" in text and "dimensions not compatible" in text
    assert text.endswith("try another --profile")


@pytest.mark.parametrize("capabilities", [["8.9"], ["8.0", "8.9"]], ids=["one", "two"])
def test_a_refit_without_a_gpu(capabilities: list[str], tmp_path: Path) -> None:
    from deployfa.runtimes.tensorrt.device import Device

    try:
        Device()
    except RuntimeTargetError:
        request = small_request(tmp_path, refit=True, compute_capabilities=capabilities)
        assert refusal(request, tmp_path).endswith("--refit needs the GPU that the engine is for; leave it out here")
    else:
        pytest.skip("there is a GPU here, which builds it")


@pytest.mark.parametrize(
    ("named", "there", "found"),
    [
        ("node_MatMul_1", ["node_MatMul_1", "node_MatMul_12"], "node_MatMul_1"),
        ("node_MatMul_12", ["node_MatMul_1", "node_MatMul_12"], "node_MatMul_12"),
        ("/a/b/MatMul", ["MatMul", "/a/b/MatMul", "/b/MatMul"], "/a/b/MatMul"),
        ("other", ["node_MatMul_1"], None),
    ],
)
def test_the_node_of_a_message_is_the_whole_name_in_it(named: str, there: list[str], found: str | None) -> None:
    text = str(
        build_error("t", [f"Cannot compile operation '{named}' for it"], [NodePlace(n, "MatMul") for n in there])
    )
    wanted = f"of node '{found}' (MatMul): " if found else "engine: "
    assert f"did not build the engine {wanted}".replace("engine engine", "engine") in text


def test_a_builder_that_says_nothing_and_one_that_says_too_much() -> None:
    assert "did not build the engine: it does not say why; " in str(build_error("t", [], []))
    assert len(str(build_error("t", ["x" * 10_000], []))) < 450
