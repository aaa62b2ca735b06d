"""Typed graphs of real architectures against PyTorch: in float64, which is the truth, and in the same low type.

``rounded`` evaluates a graph in numpy and rounds every value to its type, sums in float32.  ONNX Runtime's CPU provider
leaves out some of those roundings, and has no layer in bfloat16 at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from architectures import ARCHITECTURES
from placements import Subject

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import RuntimeTargetError
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.idle import default_active, with_idle_branch, with_row
from deployfa.graph.precision import Typed
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_slots, add_tables
from deployfa.parity.measures import normwise
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.tables import Layout, base_row, row_of

from .typed import typed, types

#: How many times PyTorch's error in the same type a typed graph may have.
LIMIT = 3.0
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
MINILM, LITE0 = "MiniLM-L6 (real weights)", "EfficientNet-Lite0 (real weights)"
LLAMA, GPT2 = "Llama (grouped queries)", "GPT-2 (tied head)"
NAMES = (MINILM, GPT2, LLAMA, "ViT", "T5 (encoder)", "ResNet", LITE0)
#: Those that numpy evaluates in a second or two.
SMALL = (GPT2, LLAMA, "ViT", "T5 (encoder)", "ResNet")
PLACED = {
    "base": (None, "auto"),
    "folded VeFA": ("VeFA", "auto"),
    "side-op VeFA": ("VeFA", "side-op"),
    "side-op LoRFA": ("LoRFA r=4", "side-op"),
}
LAYERS = ("MatMul", "Gemm", "Conv")


@dataclass(eq=False)
class Held:
    """An architecture, and what PyTorch answers in each type."""

    subject: Subject
    _answers: dict[tuple[str | None, torch.dtype], Array] = field(default_factory=dict)

    def adapter(self, kind: str | None) -> Adapter:
        return Adapter("none", {}) if kind is None else self.subject.adapter(kind)

    def torch(self, kind: str | None, dtype: torch.dtype) -> Array:
        if (kind, dtype) not in self._answers:
            self._answers[kind, dtype] = self.subject.torch(self.adapter(kind), dtype)
        return self._answers[kind, dtype]

    def limit(self, kind: str | None, precision: str) -> float:
        return LIMIT * normwise(self.torch(kind, TORCH[precision]), self.torch(kind, torch.float64))

    def placed(self, placement: str) -> tuple[str | None, ir.Model]:
        kind, preference = PLACED[placement]
        adapter = self.adapter(kind)
        plan = make_plan(self.subject.graph, adapter, placement=preference)
        return kind, apply_adapter(self.subject.graph, adapter, plan)

    def rounded(self, made: Typed) -> Array:
        feeds = {name: tensor.numpy() for name, tensor in self.subject.feeds.items()}
        return evaluate(made.model, [feeds], dtype="float32")[0][self.subject.output].astype(np.float64)


@cache
def held(name: str) -> Held:
    return Held(Subject(ARCHITECTURES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACED)
@pytest.mark.parametrize("name", NAMES)
def test_float16_is_as_near_the_truth_as_pytorchs(name: str, placement: str) -> None:
    made = held(name)
    kind, graph = made.placed(placement)
    low = typed(graph)
    assert not any(low.kept.get(op) for op in LAYERS) and sum(low.low.get(op, 0) for op in LAYERS) > 8
    truth, limit = made.torch(kind, torch.float64), made.limit(kind, "fp16")
    found = made.subject.onnxruntime(low.model)
    assert normwise(found, truth) <= limit
    # it is another graph than the float32 one, or the comparison would be of nothing
    assert normwise(found, truth) > 20 * normwise(made.torch(kind, torch.float32), truth)
    if name in SMALL:
        assert normwise(made.rounded(low), truth) <= limit


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACED)
@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_is_as_near_the_truth_as_pytorchs(name: str, placement: str) -> None:
    made = held(name)
    kind, graph = made.placed(placement)
    low = typed(graph, "bf16")
    assert not any(low.kept.get(op) for op in LAYERS) and low.model.graph.opset_imports[""] == 22
    error = normwise(made.rounded(low), made.torch(kind, torch.float64))
    assert error <= made.limit(kind, "bf16")
    # 3 bits less than float16, of which a factor of 8 follows
    assert error > 2 * normwise(made.rounded(typed(graph)), made.torch(kind, torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", [MINILM, LITE0])
def test_real_weights_in_bfloat16(name: str) -> None:
    """By its types alone: numpy would take minutes, and ONNX Runtime's CPU provider has no layer in bfloat16."""
    made = held(name)
    _, graph = made.placed("side-op VeFA")
    low, half = typed(graph, "bf16"), typed(graph)
    assert (low.low, low.kept.keys()) == (half.low, half.kept.keys())
    assert {kind for op in LAYERS for kind in types(low, op)} == {"BFLOAT16"}
    with pytest.raises(RuntimeTargetError, match="does not load the graph"):
        made.subject.onnxruntime(low.model)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_norm_of_llama_that_is_forced_is_seen_only_where_it_overflows(scale: float) -> None:
    """Embeddings a thousand times as large: RMSNorm takes that away again, unless its squares are float16."""
    made = Subject(ARCHITECTURES[LLAMA])
    with torch.no_grad():
        made.model.get_input_embeddings().weight.mul_(scale)
    table = made.graph.graph.initializers["model.embed_tokens.weight"]
    # the graph may share its numbers with the model
    table.const_value = ir.tensor(made.model.get_input_embeddings().weight.detach().numpy().copy(), name=table.name)
    one = Held(made)
    truth, limit = one.torch(None, torch.float64), one.limit(None, "fp16")
    kept = typed(made.graph)
    assert normwise(one.rounded(kept), truth) <= limit and normwise(made.onnxruntime(kept.model), truth) <= limit
    pieces = frozenset({"Pow", "ReduceMean", "Sqrt", "Reciprocal"})
    forced = typed(made.graph, force_low=pieces)
    with np.errstate(all="ignore"):
        found = one.rounded(forced)
    assert (normwise(found, truth) <= limit) == (scale == 1.0)


def _numbers(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape).astype(np.float32)


@cache
def rows() -> tuple[Held, dict[str, Adapter], Layout, dict[str, dict[str, Array]]]:
    """The real MiniLM, three adapters, and their rows."""
    made = held(MINILM)
    random = np.random.default_rng(7)
    base = BaseReference(fingerprint="sha256:of the base")
    edits: dict[str, dict[str, Edit]] = {"vefa": {}, "lorfa": {}, "other": {}}
    for path in sorted(made.subject.sites):
        k = made.subject.widths[path]
        edits["vefa"][path] = Edit(lam=0.2 * _numbers(random, k), delta=0.1 * _numbers(random, k))
        low = LowRank(_numbers(random, 4, k) / k**0.5, 0.05 * _numbers(random, k, 4), 2.0)
        edits["lorfa"][path] = Edit(input_low_rank=low)
        edits["other"][path] = Edit(lam=0.2 * _numbers(random, k))
    adapters = {name: Adapter("vefa", each, base=base) for name, each in edits.items()}
    graph = made.subject.graph
    layout = make_layout(graph, adapters)
    zero = base_row(layout, base_heads(graph, layout))
    weights = base_weights(graph, layout)
    stored = {name: row_of(each, layout, zero, weights=weights) for name, each in adapters.items()}
    return made, adapters, layout, {"base": zero, **stored}


def _run(graph: ir.Model, feeds: dict[str, Array], output: str) -> Array:
    runner = OnnxRuntimeRunner(ir.to_proto(graph).SerializeToString(), threads=1, spinning=False, optimize=False)
    names = [value.name or "" for value in graph.graph.inputs]  # those with a default too
    return runner.run({name: feeds[name] for name in names})[output].astype(np.float64)


@pytest.mark.slow
def test_slots_with_an_idle_branch() -> None:
    """Both branches are typed, and a row comes as float32."""
    made, adapters, layout, stored = rows()
    graph, output = made.subject.graph, made.subject.output
    both = with_row(with_idle_branch(graph, add_slots(graph, layout)), stored["base"])
    low = typed(both)
    (choice,) = (node for node in low.model.graph if node.op_type == "If")
    for branch in ("then_branch", "else_branch"):
        inside = [node for node in choice.attributes[branch].as_graph() if node.op_type in LAYERS]
        assert len(inside) > 30 and {node.outputs[0].dtype.name for node in inside} == {"FLOAT16"}
    inputs = {value.name: value.dtype for value in low.model.graph.inputs}
    assert all(inputs[name] == ir.DataType.FLOAT for name in (*layout.shapes(), "adapter_strength", "adapter_active"))
    own = {"adapter_strength": np.ones(1, np.float32)}
    feeds = {name: tensor.numpy() for name, tensor in made.subject.feeds.items()}
    for name in stored:
        adapter = adapters.get(name, Adapter("none", {}))
        truth = made.subject.torch(adapter, torch.float64)
        limit = LIMIT * normwise(made.subject.torch(adapter, torch.float16), truth)
        fed = {**feeds, **stored[name], **own, **default_active(name != "base")}
        assert normwise(_run(low.model, fed, output), truth) <= limit, name
        # another adapter's answers are far away
        assert normwise(_run(low.model, {**fed, **stored["lorfa"], **default_active(True)}, output), truth) > limit or (
            name == "lorfa"
        )


@pytest.mark.slow
def test_tables_that_mix_adapters_in_one_batch() -> None:
    made, adapters, layout, stored = rows()
    output = made.subject.output
    low = typed(add_tables(made.subject.graph, layout))
    feeds = {name: tensor.numpy() for name, tensor in made.subject.feeds.items()}
    ids = np.arange(len(next(iter(feeds.values())))) % len(stored)
    tables = {name: np.stack([row[name] for row in stored.values()]) for name in layout.shapes()}
    fed = {**feeds, **tables, "adapter_ids": ids, "adapter_strength": np.ones(1, np.float32)}
    found = _run(low.model, fed, output)
    for number, name in enumerate(stored):
        adapter, mine = adapters.get(name, Adapter("none", {})), ids == number
        truth = made.subject.torch(adapter, torch.float64)[mine]
        limit = LIMIT * normwise(made.subject.torch(adapter, torch.float16)[mine], truth)
        assert normwise(found[mine], truth) <= limit < normwise(np.roll(found, 1, axis=0)[mine], truth), name
