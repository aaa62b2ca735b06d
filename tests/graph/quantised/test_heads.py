"""A classifier that the adapter brings, in the place of a quantised one: floats, and nothing of the old one's range."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.errors import PlanError
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.locate import locate_sites

KINDS = ("dynamic-tensor", "dynamic-channel", "qdq-tensor", "qdq-channel", "qoperator-tensor", "int4-symmetric")


def head_of(model, site):
    """The node that multiplies with the weights that the adapter brought."""
    stored = [value for name, value in model.graph.initializers.items() if name.startswith(f"{site}.weight")]
    (weight,) = (value for value in stored if value.dtype.is_floating_point() and len(value.shape) == 2)
    ((node, _),) = weight.uses()
    return node


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["gpt2", "minilm"])
def test_a_head_replaces_a_quantised_one(model, kind, sources, quantised, integers):
    source, base = sources(model), quantised(model, kind)
    site, labels = ("classifier", 2) if model == "minilm" else ("score", 3)
    k = 384 if model == "minilm" else 48
    rng = np.random.default_rng(1)
    # far outside the range that the old head was calibrated for
    head = {"weight": (5 * rng.standard_normal((labels, k))).astype(np.float32)}
    if model == "minilm":
        head["bias"] = rng.standard_normal(labels).astype(np.float32)
    edits = source.adapter("vefa").edits
    adapter = Adapter("vefa", edits, {site: head})
    located, _ = locate_sites(base.model, {**source.sites, site: (k, labels)})
    after = apply_adapter(located, adapter, make_plan(located, adapter))

    probe = after.clone()
    x = head_of(probe, site).inputs[0]
    probe.graph.outputs.append(x)
    found = evaluate(probe, [source.feeds])[0]
    features = found[x.name].astype(np.float64)
    wanted = features @ head["weight"].T.astype(np.float64)
    if "bias" in head:
        wanted = wanted + head["bias"]
    logits = found["logits"]
    if model == "gpt2":
        # the last token of each row is picked after the head
        lengths = source.feeds["input_ids"].shape[1] - 1 - (source.feeds["input_ids"] != 0)[:, ::-1].argmax(axis=1)
        wanted = wanted[np.arange(len(lengths)), lengths]
    assert np.abs(logits - wanted).max() <= 1e-12 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 4 * np.abs(base.answer).max()

    before, kept = integers(base.model), integers(after)
    gone = before.keys() - kept.keys()
    # the old head's own, and the zero point of what it answered
    assert {name for name in gone if not name.startswith(f"{site}.")} <= {"logits_zero_point", "linear_zero_point"}
    assert gone
    assert all(before[name] == kept[name] for name in kept.keys() & before.keys())

    found = _run(after, source.feeds)
    assert np.isfinite(found).all() and found.shape == logits.shape


def test_a_module_that_answers_integers_to_a_layer_is_refused(quantised):
    """Its weight can become floats, what comes after it cannot."""
    base = quantised("cnn", "qoperator-tensor").model
    rng = np.random.default_rng(0)
    adapter = Adapter("vefa", {}, {"first": {"weight": rng.standard_normal((8, 3, 3, 3)).astype(np.float32)}})
    with pytest.raises(PlanError, match=r"quantises what a replaced module answers.*; quantise the base model with"):
        apply_adapter(base, adapter, make_plan(base, adapter))


def _run(model, feeds):
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {each.name for each in session.get_inputs()}
    return session.run(["logits"], {name: array for name, array in feeds.items() if name in wanted})[0]
