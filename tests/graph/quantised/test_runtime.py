"""ONNX Runtime on adapted quantised graphs, as a device runs them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.edits import Edit
from deployfa.graph import apply_adapter, make_plan

#: No activation is quantised: the runtime computes in floats what the graph says.
SMOOTH = ("int4-symmetric", "int4-asymmetric", "int4-qdq-symmetric", "int4-qdq-asymmetric")
#: Activations are quantised by a scale that the graph stores.  The runtime fuses such layers with their neighbours and
#: rounds elsewhere than the graph says: a number close to a half goes to the other integer, on any graph.
STATIC = ("qdq-tensor", "qdq-channel", "qoperator-tensor", "qoperator-channel")


def run(model, feeds, outputs=None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # else a QDQ int4 layer reads its activations as int8
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    wanted = {each.name for each in session.get_inputs()}
    answers = session.run(outputs or ["logits"], {name: array for name, array in feeds.items() if name in wanted})
    return answers if outputs else answers[0]


def error(found, truth):
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("placement", ["auto", "side-op"])
@pytest.mark.parametrize("name", ["vefa+delta", "lorfa", "lora"])
@pytest.mark.parametrize("kind", SMOOTH)
def test_int4_is_what_the_graph_says(kind, name, placement, sources, quantised):
    source, base = sources("gpt2"), quantised("gpt2", kind)
    adapter = source.adapter(name)
    adapted = apply_adapter(base.model, adapter, make_plan(base.model, adapter, placement=placement))
    truth = source.answer(adapted)
    # numpy and the runtime, both in float32, add up in different orders: their errors differ by a small factor
    limit = 4 * error(source.answer(adapted, "float32"), truth)
    assert error(run(adapted, source.feeds), truth) <= limit
    name = next(n for n in adapted.graph.initializers if "c_fc" in n and "scale" in n)
    value = adapted.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=name)
    assert error(run(adapted, source.feeds), truth) > limit


def test_int4_of_minilm(sources, quantised):
    source, base = sources("minilm"), quantised("minilm", "int4-asymmetric")
    adapter = source.adapter("vefa", "shared", "shared+delta", "lorfa", "lora", "vefa+delta")
    adapted = apply_adapter(base.model, adapter, make_plan(base.model, adapter))
    truth = source.answer(adapted)
    limit = 4 * error(source.answer(adapted, "float32"), truth)
    assert limit < 1e-4
    assert error(run(adapted, source.feeds), truth) <= limit


@pytest.mark.parametrize("name", ["vefa+delta", "lorfa", "lora"])
@pytest.mark.parametrize("kind", ["dynamic-tensor", "dynamic-channel"])
def test_dynamic_int8_layer_by_layer(kind, name, sources, quantised, layer_of):
    """Each layer on the input that the runtime gave it: what differs from numpy is float32 rounding, and one step for
    each number that lies so near a half that float32 cannot tell to which integer it goes."""
    source, base = sources("gpt2"), quantised("gpt2", kind)
    adapter = source.adapter(name)
    adapted = apply_adapter(base.model, adapter, make_plan(base.model, adapter, placement="side-op"))
    layers = {site: layer_of(base.model.graph, site) for site in adapter.edits}
    nodes = {node.name: node for node in adapted.graph}
    answers = {site: nodes[layer.reads[0]].inputs[layer.reads[1]].name for site, layer in layers.items()}
    known = {value.name: value for node in adapted.graph for value in node.outputs}
    wanted = [*dict.fromkeys([*(layer.x for layer in layers.values()), *answers.values()])]
    adapted.graph.outputs.extend(known[name] for name in wanted)
    found = dict(zip(wanted, run(adapted, source.feeds, wanted), strict=True))

    def off(layer, edit, x, y):
        # sums of k + 3 r terms in float32; T(x) itself is rounded before it is quantised
        limit = (x.shape[-1] + 32) * 2.0**-24 * layer(x, edit, absolute=True)
        return np.abs(y - layer(x, edit)) > limit + layer.doubt(x, edit, nearness=1e-3)

    for site, layer in layers.items():
        x, y, edit = found[layer.x], found[answers[site]], adapter.edits[site]
        assert not off(layer, edit, x, y).any(), site
        assert off(layer, Edit(), x, y).mean() > 0.5, "an edit left out is seen"


@pytest.mark.parametrize("name", ["vefa+delta", "lorfa", "lora"])
@pytest.mark.parametrize("kind", [*STATIC, "dynamic-tensor", "dynamic-channel"])
def test_steps_are_no_larger_than_quantising_was(kind, name, sources, quantised):
    """End to end an adapted graph in the runtime is no further from exact arithmetic than int8 is from floats."""
    source, base = sources("gpt2"), quantised("gpt2", kind)
    adapter = source.adapter(name)
    adapted = apply_adapter(base.model, adapter, make_plan(base.model, adapter))
    limit = max(error(run(base.model, source.feeds), base.answer), error(base.answer, source.truth))
    assert error(run(adapted, source.feeds), source.answer(adapted)) <= limit
