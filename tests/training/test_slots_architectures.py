"""Slots with an idle branch on real architectures, under every fusion: MatMul and Gemm sites, convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import onnx
import pytest
from architectures import ARCHITECTURES
from placements import Subject

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import PlanError
from deployfa.graph import apply_adapter, find_sites, make_plan
from deployfa.graph.idle import with_idle_branch, with_row
from deployfa.graph.optimize import fuse
from deployfa.graph.resize import resize_heads
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_slots
from deployfa.graph.sites import Site
from deployfa.graph.storage import save_graph
from deployfa.parity.measures import LIMIT, normwise
from deployfa.runtimes.onnx_adapter import write_onnx_adapter
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.slots import SlotRunner
from deployfa.tables import base_row, row_of

BASE = BaseReference(fingerprint="sha256:of the base")
METHODS = ("vefa", "shifted", "lorfa", "lora", "ia3")


def edit(method: str, site: Site, seed: int) -> Edit:
    """Perturbed in every part; where a convolution cannot have it from an input, λ instead."""
    random = np.random.default_rng(seed)

    def numbers(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    k, d = site.in_features, site.out_features
    padded = any(use.zero_padding or use.pads_first for use in site.uses)
    if method == "shifted" and not padded:
        return Edit(lam=0.2 * numbers(k), delta=0.1 * numbers(k))
    if method == "lorfa" and site.groups == 1:
        return Edit(input_low_rank=LowRank(numbers(4, k) / k**0.5, 0.1 * numbers(k, 4), 2.0))
    if method == "lora" and not site.convolves:
        return Edit(output_low_rank=LowRank(numbers(3, k) / k**0.5, 0.1 * numbers(d, 3), 1.0))
    if method == "ia3":
        return Edit(output_scale=0.2 * numbers(d))
    return Edit(lam=0.2 * numbers(k))


@dataclass(eq=False)
class Swapped:
    """An architecture, two adapters of one method on every site of it, and their rows."""

    subject: Subject
    method: str

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        sites = find_sites(self.subject.graph)
        return {
            name: Adapter(
                self.method,
                {p: edit(self.method, sites[p], seed + n) for n, p in enumerate(sorted(self.subject.sites))},
                base=BASE,
            )
            for name, seed in (("a", 100), ("b", 900))
        }

    @cached_property
    def layout(self):
        return make_layout(self.subject.graph, {"a": self.adapters["a"]})

    @cached_property
    def zero(self) -> dict[str, Array]:
        return base_row(self.layout, base_heads(self.subject.graph, self.layout))

    def row(self, name: str) -> dict[str, Array]:
        weights = base_weights(self.subject.graph, self.layout)
        return row_of(self.adapters[name], self.layout, self.zero, weights=weights)

    def run(self, model, folder: Path) -> Array:
        """``model`` by itself, its weights in a file as the bundle's are."""
        folder.mkdir()
        runner = OnnxRuntimeRunner(save_graph(model, folder), threads=1, spinning=False)
        return runner.run(self.feeds(runner))[self.subject.output]

    def feeds(self, runner) -> dict[str, Array]:
        return {spec.name: self.subject.feeds[spec.name].numpy() for spec in runner.inputs}


@cache
def subject(name: str) -> Subject:
    return Subject(ARCHITECTURES[name])


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["none", "ort", "onnxscript"])
@pytest.mark.parametrize("name", ["BERT", "GPT-2 (classifier)", "ConvNeXt"])
def test_every_method_swaps_and_idle_is_the_base_bit_for_bit(name: str, fusion: str, tmp_path: Path) -> None:
    made = subject(name)
    base = fuse(made.graph, fusion)
    for method in METHODS:
        swapped = Swapped(made, method)
        slots = fuse(add_slots(made.graph, swapped.layout), fusion)
        folder = tmp_path / method
        folder.mkdir()
        path = save_graph(with_row(with_idle_branch(base, slots), swapped.zero), folder, share_equal=True)
        runner = SlotRunner(path, swapped.layout, threads=1, spinning=False)
        feeds = swapped.feeds(runner)

        idle = runner.run(feeds, None)[made.output]
        assert np.array_equal(idle, swapped.run(base, folder / "base")), method

        write_onnx_adapter(folder / "a.onnx_adapter", swapped.row("a"), swapped.layout, idle_branch=True)
        file, fed = runner.load(folder / "a.onnx_adapter"), runner.load(swapped.row("b"))
        first = runner.run(feeds, file)[made.output]
        other = runner.run(feeds, fed)[made.output]
        assert np.array_equal(runner.run(feeds, file)[made.output], first), method
        assert np.array_equal(runner.run(feeds, None)[made.output], idle), method
        assert not np.allclose(first, other, rtol=0.01) and not np.allclose(first, idle, rtol=0.01), method

        # within the noise of the truth, and of the same adapter folded
        for adapter, found in ((swapped.adapters["a"], first), (swapped.adapters["b"], other)):
            unfolded = apply_adapter(made.graph, adapter, make_plan(made.graph, adapter, placement="side-op"))
            truth = made.float64(unfolded)
            assert truth is not None
            noise = normwise(made.onnxruntime(unfolded), truth)
            assert normwise(found.astype(np.float64), truth) <= LIMIT * noise, method
        folded = fuse(
            apply_adapter(made.graph, swapped.adapters["b"], make_plan(made.graph, swapped.adapters["b"])), fusion
        )
        assert normwise(other.astype(np.float64), swapped.run(folded, folder / "folded")) <= LIMIT * noise, method


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [("BERT", "classifier"), ("GPT-2 (classifier)", "score")])
def test_a_head_with_more_labels_than_the_base(name: str, head: str, tmp_path: Path) -> None:
    """Behind GPT-2's head the last token is picked: what is said of shapes there must follow."""
    made = subject(name)
    site = find_sites(made.graph)[head]
    random = np.random.default_rng(5)

    def adapter(labels: int) -> Adapter:
        weight = random.standard_normal((labels, site.in_features)).astype(np.float32)
        bias = {} if site.uses[0].bias is None else {"bias": random.standard_normal(labels).astype(np.float32)}
        return Adapter("head", {}, modules={head: {"weight": weight, **bias}}, base=BASE)

    own, larger = adapter(site.out_features), adapter(20)
    layout = make_layout(made.graph, {"own": own}, max_labels=20)
    zero = base_row(layout, base_heads(made.graph, layout))
    model = with_row(with_idle_branch(made.graph, add_slots(made.graph, layout)), zero)
    path = save_graph(model, tmp_path, share_equal=True)
    onnx.checker.check_model(str(path), full_check=True)
    assert not isinstance(model.graph.outputs[0].shape[-1], int)
    runner = SlotRunner(path, layout, threads=1, spinning=False)
    feeds = {spec.name: made.feeds[spec.name].numpy() for spec in runner.inputs}
    for each, labels in ((own, site.out_features), (larger, 20)):
        found = runner.run(feeds, runner.load(row_of(each, layout, zero)))[made.output]
        base = resize_heads(made.graph, each)
        headed = apply_adapter(base, each, make_plan(base, each))
        truth = made.float64(headed)
        assert truth is not None and truth.shape[-1] == labels
        assert np.isneginf(found[..., labels:]).all()
        noise = normwise(made.onnxruntime(headed), truth)
        assert normwise(found[..., :labels].astype(np.float64), truth) <= LIMIT * noise


@pytest.mark.slow
def test_slots_need_no_batch() -> None:
    """What reads positions has no rows to tell apart, and one row for all asks for none."""
    made = subject("DeBERTa-v2")
    sites = find_sites(made.graph)
    adapter = Adapter("vefa", {p: edit("vefa", sites[p], n) for n, p in enumerate(sorted(made.sites))}, base=BASE)
    with pytest.raises(PlanError, match="the same for every row of a batch"):
        make_layout(made.graph, {"a": adapter})
    layout = make_layout(made.graph, {"a": adapter}, mixed=False)
    zero = base_row(layout, base_heads(made.graph, layout))
    unfolded = apply_adapter(made.graph, adapter, make_plan(made.graph, adapter, placement="side-op"))
    truth = made.float64(unfolded)
    assert truth is not None
    found = made.onnxruntime(with_row(add_slots(made.graph, layout), row_of(adapter, layout, zero)))
    assert normwise(found, truth) <= LIMIT * normwise(made.onnxruntime(unfolded), truth)
