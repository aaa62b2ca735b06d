"""What the property tests draw, and the one comparison that they all make.

``PROPERTY_EXAMPLES=20000 pytest tests/graph/test_properties_*.py`` searches further, with another seed each time; by
itself the search is small and the same on every machine.
"""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from deployfa.adapter import Adapter
from deployfa.edits import Edit, LowRank
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate

#: How each case is planned.
WAYS = {
    "auto": {},
    "own weight": {"prefer": "own-weight"},
    "untied": {"untie": True},
    "side op": {"placement": "side-op"},
}
PARTS = ("lam", "delta", "lorfa", "lora")
_EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "0"))


def search(examples):
    """A search of ``examples`` cases, the same ones every time, or a longer random one if asked for."""
    return settings(
        max_examples=_EXAMPLES or examples,
        print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def numbers(rng, *shape):
    """Of either sign, 1/16 to 2: far from what halves cannot hold, and none near enough to the rest to stand for it."""
    return rng.uniform(1 / 16, 2, shape) * rng.choice([-1.0, 1.0], shape)


def seeds():
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


def factors(rng, k, kind="any", groups=1):
    """1 + λ: (k,).  ``repeated``: alike in each of ``groups`` parts; ``partly``: 1 in all but one part."""
    f = numbers(rng, k)
    if kind == "positive":
        return np.abs(f)
    if kind == "one":
        return np.full(k, f[0])
    if kind == "repeated":
        return np.repeat(f[:groups], k // groups)
    if kind == "partly":
        f[: k // 2] = 1.0
    if kind == "dead":
        f[0] = 0.0
    return f


def make_edit(rng, site, parts, *, factor=None, rank=2):
    """An edit that fits ``site``, no part of it near the identity."""
    k, d = site.k, site.d
    lam = None
    if "lam" in parts:
        lam = (numbers(rng, k) if factor is None else factor).astype(np.float64) - 1.0

    def low(out, kernel=()):
        a, b = numbers(rng, rank, k, *kernel).astype(np.float32), numbers(rng, out, rank).astype(np.float32)
        return LowRank(a, b, float(rng.choice([0.75, -1.5])))

    kernel = () if set(site.kernel) == {1} and rng.random() < 0.5 else site.kernel
    return Edit(
        lam=None if lam is None else lam.astype(np.float32),
        delta=numbers(rng, k).astype(np.float32) if "delta" in parts else None,
        input_low_rank=low(k) if "lorfa" in parts else None,
        output_low_rank=low(d, kernel) if "lora" in parts and not site.transposed else None,
    )


def some_parts():
    """Each part alone, and any of them together."""
    return st.sampled_from([(part,) for part in PARTS]) | st.sets(st.sampled_from(PARTS), min_size=1).map(
        lambda found: tuple(sorted(found))
    )


def as_text(model):
    """The nodes, for whoever reads a failure."""
    return "\n".join(
        f"{', '.join(o.name for o in node.outputs)} = {node.op_type}"
        f"({', '.join(i.name if i is not None else '' for i in node.inputs)}) "
        f"{ {name: a.value for name, a in node.attributes.items() if a.type != ir.AttributeType.TENSOR} } "
        f"{node.metadata_props.get('pkg.torch.onnx.name_scopes', '')} "
        f"{[str(o.shape) for o in node.outputs]}"
        for node in model.graph
    )


def as_bytes(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def outputs(model, feeds):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return evaluate(one_group_each(model), [feeds])[0]


def one_group_each(model):
    """Transposed convolutions of several groups as one for each group: ``onnx.reference`` 1.23 cuts W along the outputs
    there, and answers something else or fails."""
    grouped = [n for n in model.graph if n.op_type == "ConvTranspose" and n.attributes.get_int("group", 1) > 1]
    if not grouped:
        return model
    model = model.clone()
    for node in [n for n in model.graph if n.op_type == "ConvTranspose" and n.attributes.get_int("group", 1) > 1]:
        count = node.attributes.get_int("group")
        parts = []
        for value, axis in zip(node.inputs, (1, 0, 0), strict=False):
            parts.append(ir.node("Split", [value], attributes={"axis": axis, "num_outputs": count}, num_outputs=count))
        how = dict(node.attributes) | {"group": ir.AttrInt64("group", 1)}
        each = []
        for group in range(count):
            operands = [split.outputs[group] for split in parts[:2]]
            each.append(ir.node("ConvTranspose", operands, attributes=how))
            if len(node.inputs) > 2:
                each[-1].resize_inputs(3)
                each[-1].replace_input_with(2, parts[2].outputs[group])
        whole = ir.node("Concat", [one.outputs[0] for one in each], attributes={"axis": 1})
        made = [*parts, *each, whole]
        for new in made:
            for output in new.outputs:
                output.type = node.outputs[0].type
        model.graph.insert_before(node, made)
        name, old = node.outputs[0].name, node.outputs[0]
        old.replace_all_uses_with(whole.outputs[0], replace_graph_outputs=True)
        old.name, whole.outputs[0].name = None, name
        model.graph.remove(node, safe=True)
    return model


def wrong(found, balls, values):
    """Names of the outputs that lie outside their ball."""
    return [value.name for value in values if not balls[value].holds(found[value.name])]


def rewritten(model, edits, way):
    """(the model with the edits placed, the plan)"""
    adapter = Adapter("vefa", dict(edits))
    plan = make_plan(model, adapter, **WAYS[way])
    return apply_adapter(model, adapter, plan), plan


def agree(twin, values, edits, *, ways=tuple(WAYS), seen=None, opset=23):
    """Every way of placing ``edits`` gives what the steps in numpy give, and so does the base without any.

    ``values``: the outputs.  Counts the placements in ``seen``.
    """
    model = twin.model(*values, opset=opset)
    original = as_bytes(model)
    assert not wrong(outputs(model, twin.feeds), twin.meaning({}), values), "the base graph is not what it should be"
    balls = twin.meaning(edits)
    integers = stored_integers(model)
    for way in ways:
        changed, plan = rewritten(model, edits, way)
        where = {edit.site: (edit.placement, edit.reason) for edit in plan.edits}
        bad = wrong(outputs(changed, twin.feeds), balls, values)
        assert not bad, f"{way}: {bad} wrong, placed {where}, in\n{as_text(model)}"
        kept = stored_integers(changed)
        assert all(kept.get(name) == data for name, data in integers.items()), f"{way}: integers changed, {where}"
        if seen is not None:
            seen.update(f"{way}: {edit.placement}" for edit in plan.edits)
    assert as_bytes(model) == original, "the caller's graph changed"
    return model


def stored_integers(model):
    """Name → bytes of every initializer of 8 bits or fewer: a quantised weight, or its zero points."""
    found = {}
    for name, value in model.graph.initializers.items():
        if not value.dtype.is_floating_point() and value.dtype.bitwidth <= 8:
            found[name] = value.const_value.tobytes()
    return found
