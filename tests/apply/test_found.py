"""The real MiniLM from other exporters: how each site is found, and that what comes out equals the project's own."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.apply import apply_to_graph, read_site_names
from deployfa.graph import Plan, apply_adapter, make_plan
from deployfa.graph.storage import load_graph

#: graph → how the encoder's layers are found in it, and the classifier
FOUND = {
    "own": ("module path", "module path"),
    "stripped": ("initializer name", "initializer name"),
    "no-shapes": ("initializer name", "initializer name"),
    "ort-basic": ("initializer name", "initializer name"),
    # the legacy exporter calls transposed weights onnx::MatMul_123; biases keep their names
    "legacy": ("bias name", "initializer name"),
    "legacy-ort-basic": ("bias name", "initializer name"),
}


def error(found, truth):
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def written(folder):
    return load_graph(folder / "model.onnx")


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "vefa") for name in FOUND), ("legacy", "lorfa"), ("legacy", "lora")]
)
def test_by_name(name, kind, foreign, adapters, ours, answer_of, tmp_path):
    adapter = adapters[kind]
    applied = apply_to_graph(foreign[name], adapter, tmp_path / "out")
    encoder, head = FOUND[name]
    assert [site.site for site in applied.located] == [*adapter.edits, "classifier"]
    assert {site.how for site in applied.located[:-1]} == {f"{encoder} '{site}'" for site in adapter.edits}
    assert applied.located[-1].how == f"{head} 'classifier'"
    own = ours(kind)
    assert error(answer_of(written(tmp_path / "out")), own.truth) <= own.noise
    # the adapter was worth placing, and the graph that was given is still the base
    assert error(answer_of(load_graph(foreign[name])), own.truth) > 1000 * own.noise


@pytest.mark.parametrize("placement", ["auto", "side-op"])
def test_by_comparing_weights(placement, foreign, adapters, ours, answer_of, minilm_dir, tmp_path):
    """No name says anything.  The classifier is not the base model's, so its place has to be named."""
    adapter, graph = adapters["lorfa"], foreign["scrambled"]
    (head,) = (n for n in load_graph(graph).graph if n.op_type == "Gemm" and 2 in n.inputs[1].shape)
    named = {"classifier": head.name}
    applied = apply_to_graph(graph, adapter, tmp_path / "out", named=named, model=minilm_dir, placement=placement)
    assert all(site.how == f"comparing weights: '{site.weight}'" for site in applied.located[:-1])
    assert applied.located[-1].how == f"--sites: '{head.name}'"
    own = ours("lorfa")
    assert error(answer_of(written(tmp_path / "out")), own.truth) <= own.noise


def test_a_prefix_that_the_graph_lacks(foreign, adapters, ours, answer_of, tmp_path):
    """The encoder exported alone; the adapter was trained on the classifier, whose encoder is called ``bert``."""
    adapter = Adapter("vefa", adapters["vefa"].edits)
    applied = apply_to_graph(foreign["encoder"], adapter, tmp_path / "out")
    assert {site.how for site in applied.located} == {f"bias name '{site[5:]}'" for site in adapter.edits}
    # the same hidden states as inside our own graph
    base = load_graph(ours("vefa").path)
    (pooler,) = (node for node in base.graph if node.op_type == "Gemm" and "pooler" in node.inputs[1].name)
    first = pooler.inputs[0].producer()
    adapted = apply_adapter(base, adapter, make_plan(base, adapter))
    (hidden,) = (node.inputs[0] for node in adapted.graph if node.name == first.name)
    adapted.graph.outputs.append(hidden)
    truth = answer_of(adapted, output=hidden.name)
    assert truth.shape == (2, 6, 384)
    noise = error(answer_of(adapted, output=hidden.name, dtype="float32"), truth)
    assert error(answer_of(written(tmp_path / "out"), output="hidden"), truth) <= noise


@pytest.mark.parametrize("name", ["stripped", "legacy", "scrambled"])
def test_the_written_sites_find_them_again(name, foreign, adapters, minilm_dir, hashes, tmp_path):
    adapter, model = Adapter("vefa", adapters["vefa"].edits), minilm_dir if name == "scrambled" else None
    first = apply_to_graph(foreign[name], adapter, tmp_path / "first", model=model)
    named = read_site_names(tmp_path / "first" / "sites.json")
    assert named == {site.site: site.weight for site in first.located}
    second = apply_to_graph(foreign[name], adapter, tmp_path / "second", named=named)
    assert {site.how for site in second.located} == {f"--sites: '{weight}'" for weight in named.values()}
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    # and by the names of the nodes
    by_node = {site.site: site.nodes[0] for site in first.located}
    apply_to_graph(foreign[name], adapter, tmp_path / "third", named=by_node)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "third")


@pytest.mark.parametrize("name", ["stripped", "legacy"])
def test_what_was_given_stays_as_it_was(name, foreign, adapters, trained, hashes, tmp_path):
    before = hashes(foreign[name].parent)
    applied = apply_to_graph(foreign[name], adapters["vefa"], tmp_path / "out", placement="side-op")
    assert hashes(foreign[name].parent) == before
    assert sorted(hashes(applied.folder)) == ["model.onnx", "model.onnx.data", "plan.json", "sites.json"]
    onnx.checker.check_model(str(applied.folder / "model.onnx"), full_check=True)
    plan = msgspec.json.decode((applied.folder / "plan.json").read_bytes(), type=Plan)
    assert plan == applied.plan and {edit.placement for edit in plan.edits} == {"side op"}


def test_a_float16_graph_has_the_weights_of_its_base(foreign, adapters, minilm_dir, tmp_path):
    """Rounded once from the checkpoint's: still the base model's; one more change and it is another."""
    model = load_graph(foreign["scrambled"])
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT:
            with np.errstate(over="ignore"):  # the mask's -3e38
                half = value.const_value.numpy().astype(np.float16)
            value.const_value = ir.tensor(half, name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    ir.save(model, tmp_path / "half.onnx", external_data="half.onnx.data")
    adapter = Adapter("vefa", adapters["vefa"].edits)
    applied = apply_to_graph(tmp_path / "half.onnx", adapter, tmp_path / "out", model=minilm_dir)
    assert all(site.how.startswith("comparing weights") for site in applied.located)
    by_name = apply_to_graph(foreign["scrambled"], adapter, tmp_path / "single", model=minilm_dir)
    assert [site.nodes for site in applied.located] == [site.nodes for site in by_name.located]


def test_site_names_are_read_from_json(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"a.b": "MatMul_1"}))
    assert read_site_names(tmp_path / "map.json") == {"a.b": "MatMul_1"}
