"""Adapters on int8 and int4 graphs of real models: what is computed is ``W T(x)`` of the quantised W and nothing else.

The references share no code: numpy, layer by layer (``Layer``), and the side ops, end to end.  Both are held against
the same graph with its floats widened to float64, where a fold and a side op may differ by float64 rounding only.  That
makes the comparison sharp: where activations are quantised, one float32 rounding can move a number to the next integer,
which moves all that follows.  What is stored is then that graph with every number rounded once, to the bit.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate

KINDS = (
    *("dynamic-tensor", "dynamic-channel", "qdq-tensor", "qdq-channel", "qoperator-tensor", "qoperator-channel"),
    *("int4-symmetric", "int4-asymmetric", "int4-qdq-symmetric", "int4-qdq-asymmetric"),
)
#: MiniLM: each of its six layers with another kind of edit
EVERY = ("vefa", "shared", "shared+delta", "lorfa", "lora", "vefa+delta")
ADAPTERS = {"gpt2": (("vefa",), ("vefa+delta",), ("lorfa",), ("lora",)), "minilm": (EVERY,)}
CASES = [case for model, names in ADAPTERS.items() for case in itertools.product([model], KINDS, names)]
#: float64 sums of at most 1536 + 3 terms, a dozen roundings in each
SUM = 2000 * 2.0**-53


def adapted(model, adapter, placement="auto"):
    return apply_adapter(model, adapter, make_plan(model, adapter, placement=placement))


def error(found, truth):
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def with_outputs(model, names):
    """``model`` that also answers the values called ``names``."""
    probe = model.clone()
    known = {value.name: value for node in probe.graph for value in node.outputs}
    known |= {value.name: value for value in probe.graph.inputs}
    outputs = {value.name for value in probe.graph.outputs}
    probe.graph.outputs.extend(known[name] for name in dict.fromkeys(names) if name not in outputs)
    return probe


def read_by(model, reader):
    """The name of what the node ``reader`` = (name, index) reads."""
    (node,) = (node for node in model.graph if node.name == reader[0])
    return node.inputs[reader[1]].name


def check_layers(base, side_ops, adapter, layer_of, feeds):
    """Every adapted layer against numpy, each on the input that it has in the adapted graph; returns the logits."""
    layers = {site: layer_of(base.graph, site) for site in adapter.edits}
    answers = {site: read_by(side_ops, layer.reads) for site, layer in layers.items()}
    probe = with_outputs(side_ops, [*(layer.x for layer in layers.values()), *answers.values()])
    found = evaluate(probe, [feeds])[0]
    for site, layer in layers.items():
        x, y, edit = found[layer.x], found[answers[site]], adapter.edits[site]
        wanted = layer(x, edit)
        assert y.shape == wanted.shape
        limit = SUM * layer(x, edit, absolute=True) if layer.answer is None else 0
        assert (np.abs(y.astype(np.float64) - wanted) <= limit).all(), f"{site} is not W T(x)"
    return found["logits"]


def check_integers(before, after, integers):
    """Every stored integer is the byte that it was; what is new counts or measures (the parts of a split)."""
    old, new = integers(before), integers(after)
    assert old.items() <= new.items()
    assert {dtype for dtype, _, _ in (new[name] for name in new.keys() - old.keys())} <= {ir.DataType.INT64}


def check_rounded_once(stored, wide):
    """The same graph as ``wide``, node by node, every number of it rounded once."""

    def wiring(model):
        return [(n.op_type, n.name, [v and v.name for v in n.inputs], [v.name for v in n.outputs]) for n in model.graph]

    assert wiring(stored) == wiring(wide)
    ours, theirs = stored.graph.initializers, wide.graph.initializers
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        number = theirs[name].const_value.numpy()
        assert np.array_equal(value.const_value.numpy(), number.astype(value.dtype.numpy())), (
            f"{name} is another number"
        )


@pytest.mark.parametrize(("model", "kind", "names"), CASES, ids=lambda part: part if isinstance(part, str) else part[0])
def test_what_an_adapter_computes(model, kind, names, sources, quantised, layer_of, integers):
    source, base = sources(model), quantised(model, kind)
    adapter = source.adapter(*names)
    plan = make_plan(base.model, adapter)
    folded, beside = apply_adapter(base.model, adapter, plan), adapted(base.model, adapter, "side-op")
    wide_folded, wide_beside = apply_adapter(base.wide, adapter, plan), adapted(base.wide, adapter, "side-op")

    truth = check_layers(base.wide, wide_beside, adapter, layer_of, source.feeds)
    # an adapter that does nothing would prove nothing
    assert error(base.answer, truth) > 1e-2
    if plan.folded:
        # the same numbers multiplied in another order: some hundred float64 roundings on the way
        assert error(source.answer(wide_folded), truth) <= 1e-12
    for stored, wide in ((folded, wide_folded), (beside, wide_beside)):
        check_integers(base.model, stored, integers)
        check_rounded_once(stored, wide)
    if kind.startswith("int4"):
        # no activation is quantised: one rounding of each number is less than what float32 does to the model
        assert error(source.answer(folded), truth) <= source.noise


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_nothing_changes_nothing(kind, sources, quantised):
    """Between the layers too: what the comparison of single layers does not look at."""
    source, base = sources("gpt2"), quantised("gpt2", kind)
    for name in ("vefa+delta", "lorfa", "lora"):
        zero = {site: Edit.from_tensors(site, _zeros(edit)) for site, edit in source.adapter(name).edits.items()}
        beside = adapted(base.wide, Adapter("vefa", zero), "side-op")
        assert error(source.answer(beside), source.answer(base.wide)) <= 1e-14


def _zeros(edit):
    return {name: array if name.endswith("s") else np.zeros_like(array) for name, array in edit.tensors().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"])
def test_the_checks_see_one_scale_and_one_integer(kind, site, sources, quantised, layer_of, integers):
    source, base = sources("gpt2"), quantised("gpt2", kind)
    adapter = source.adapter("vefa")
    stored, wide = (adapted(model, adapter, "side-op") for model in (base.model, base.wide))
    own = {name: value for name, value in wide.graph.initializers.items() if name.startswith(f"{site}.weight")}

    scale = next(name for name in own if "_scale" in name)
    with pytest.raises(AssertionError, match=rf"{site} is not W T\(x\)"):
        check_layers(base.wide, _spoilt(wide, scale, lambda a: a * 1.01), adapter, layer_of, source.feeds)
    with pytest.raises(AssertionError, match=f"{scale} is another number"):
        check_rounded_once(_spoilt(stored, scale, lambda a: np.nextafter(a, a + 1)), wide)

    integer = max((name for name in own if name in integers(base.model)), key=lambda name: own[name].const_value.size)
    changed = _spoilt(wide, integer, _one_number_changed)
    with pytest.raises(AssertionError):
        check_integers(base.model, changed, integers)
    with pytest.raises(AssertionError, match=rf"{site} is not W T\(x\)"):
        check_layers(base.wide, changed, adapter, layer_of, source.feeds)


def _spoilt(model, name, change):
    """A clone in which ``change`` has been at one initializer."""
    result = model.clone()
    value = result.graph.initializers[name]
    value.const_value = ir.tensor(change(value.const_value.numpy()), dtype=value.dtype, name=name)
    return result


def _one_number_changed(array):
    changed = array.copy()
    at = changed.reshape(-1)
    at[7] = 3 if int(at[7]) != 3 else 4
    return changed
