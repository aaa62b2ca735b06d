"""Mixed batches on every architecture: each row is its own adapter's answer, and no row sees another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
import pytest
from architectures import ARCHITECTURES
from placements import Subject

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import PlanError
from deployfa.graph import apply_adapter, find_sites, make_plan
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_slots, add_tables
from deployfa.graph.sites import Site
from deployfa.parity.measures import LIMIT, normwise
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.tables import Layout, base_row, row_of

Values = dict[str, Array]
_BASE = BaseReference(fingerprint="sha256:of the base")
#: What reads positions, which have no rows; see ``test_a_site_without_a_batch_is_refused``.
_POSITIONS = {"DeBERTa-v2": ("pos_key_proj", "pos_query_proj")}
#: Their sites' inputs are laid out as those of another that is tried; all 29 passed when this was written.
_ALIKE = {
    *("BERT", "RoBERTa", "DistilBERT", "ELECTRA", "Llama (tied head)", "Qwen2", "Gemma", "Phi", "Qwen2-MoE"),
    *("T5 (encoder)", "ViT", "CLIP (text)", "GPT-2 (tied head)"),
}


@dataclass(eq=False)
class Mixed:
    """An architecture, four adapters of all kinds on every site of it, and their table."""

    subject: Subject
    without: tuple[str, ...] = ()

    @cached_property
    def sites(self) -> dict[str, Site]:
        found = find_sites(self.subject.graph)
        return {p: s for p, s in found.items() if p in self.subject.sites and not p.endswith(self.without or ("\0",))}

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        random = np.random.default_rng(3)

        def numbers(*shape: int) -> Array:
            return random.standard_normal(shape).astype(np.float32)

        def vefa(site: Site, k: int, _: int) -> Edit:
            padded = any(use.zero_padding or use.pads_first for use in site.uses)
            return Edit(lam=0.2 * numbers(k), delta=None if padded else 0.1 * numbers(k))

        def lorfa(_: Site, k: int, __: int) -> Edit:
            return Edit(input_low_rank=LowRank(numbers(4, k) / k**0.5, 0.1 * numbers(k, 4), 2.0))

        def lora(site: Site, k: int, d: int) -> Edit:
            if site.convolves:
                return Edit(lam=0.2 * numbers(k))
            return Edit(output_low_rank=LowRank(numbers(3, k) / k**0.5, 0.1 * numbers(d, 3), 1.0))

        def ia3(_: Site, __: int, d: int) -> Edit:
            return Edit(output_scale=0.2 * numbers(d))

        kinds: dict[str, Callable[[Site, int, int], Edit]] = {"vefa": vefa, "lorfa": lorfa, "lora": lora, "ia3": ia3}
        return {
            kind: Adapter(kind, {p: make(s, s.in_features, s.out_features) for p, s in self.sites.items()}, base=_BASE)
            for kind, make in kinds.items()
        }

    @cached_property
    def rows(self) -> list[Values]:
        layout = self.layout
        zero = base_row(layout, base_heads(self.subject.graph, layout))
        weights = base_weights(self.subject.graph, layout)
        return [zero, *(row_of(adapter, layout, zero, weights=weights) for adapter in self.adapters.values())]

    @cached_property
    def layout(self) -> Layout:
        return make_layout(self.subject.graph, self.adapters)

    @cached_property
    def tables(self) -> Values:
        return {name: np.stack([row[name] for row in self.rows]) for name in self.layout.shapes()}

    @cached_property
    def runner(self) -> OnnxRuntimeRunner:
        return _runner(add_tables(self.subject.graph, self.layout))

    @cached_property
    def ids(self) -> Array:
        batch = next(iter(self.subject.feeds.values())).shape[0]
        return np.random.default_rng(0).permutation(np.arange(batch) % len(self.rows))

    def mixed(self, tables: Values, ids: Array | None = None, strength: Array | float = 1.0) -> Array:
        feeds = {s.name: self.subject.feeds[s.name].numpy() for s in self.runner.inputs if s.name in self.subject.feeds}
        own = {"adapter_ids": self.ids if ids is None else ids}
        own["adapter_strength"] = np.atleast_1d(np.asarray(strength, np.float32))
        return self.runner.run({**feeds, **tables, **own})[self.subject.output]

    def errors(self, found: Array) -> list[float]:
        """For the base and each adapter, the error of its rows over the float32 noise of its own unfolded graph."""
        measured = []
        for number, (truth, noise) in enumerate(self.truths):
            chosen = self.ids == number
            measured.append(normwise(found[chosen].astype(np.float64), truth[chosen]) / noise)
        return measured

    @cached_property
    def truths(self) -> list[tuple[Array, float]]:
        """For the base and each adapter, the float64 answers of its own unfolded graph, and their float32 noise."""
        found = []
        graph = self.subject.graph
        for adapter in (Adapter("base", {}), *self.adapters.values()):
            own = apply_adapter(graph, adapter, make_plan(graph, adapter, placement="side-op"))
            truth = self.subject.float64(own)
            assert truth is not None
            found.append((truth, normwise(self.subject.onnxruntime(own), truth)))
        return found


def _runner(graph: ir.Model) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(ir.to_proto(graph).SerializeToString(), threads=1, spinning=False, optimize=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in _ALIKE])
def test_every_row_of_a_mixed_batch_is_its_own_adapters(name: str) -> None:
    mixed = Mixed(Subject(ARCHITECTURES[name]), _POSITIONS.get(name, ()))
    found = mixed.mixed(mixed.tables)
    assert max(mixed.errors(found)) <= LIMIT

    # one adapter's numbers changed: the other rows do not move by a bit, and its own do
    other = {key: table.copy() for key, table in mixed.tables.items()}
    for table in other.values():
        table[2] += 0.01
    moved = mixed.mixed(other)
    same = np.array([np.array_equal(a, b) for a, b in zip(found, moved, strict=True)])
    assert np.array_equal(same, mixed.ids != 2)

    # the check sees two rows of one table swapped
    name_of_one = next(iter(mixed.tables))
    swapped = {key: table.copy() for key, table in mixed.tables.items()}
    swapped[name_of_one][[1, 4]] = swapped[name_of_one][[4, 1]]
    assert max(mixed.errors(mixed.mixed(swapped))) > 100 * LIMIT

    # strength 0 is the base, to the bit; strengths are each row's own
    batch = len(mixed.ids)
    base = mixed.mixed(mixed.tables, np.zeros(batch, np.int64))
    assert np.array_equal(mixed.mixed(mixed.tables, strength=np.zeros(batch)), base)
    half = np.where(np.arange(batch) % 2, 1.0, 0.0)
    some = mixed.mixed(mixed.tables, strength=half)
    assert np.array_equal(some[half == 1], found[half == 1])
    assert np.array_equal(some[half == 0], base[half == 0])


@pytest.mark.parametrize("name", ["BERT", "GPT-2 (classifier)", "ConvNeXt"])
def test_a_row_in_slots_answers_as_the_same_row_of_a_table(name: str) -> None:
    mixed = Mixed(Subject(ARCHITECTURES[name]))
    slots = _runner(add_slots(mixed.subject.graph, mixed.layout))
    feeds = {s.name: mixed.subject.feeds[s.name].numpy() for s in slots.inputs if s.name in mixed.subject.feeds}
    found = np.zeros_like(mixed.mixed(mixed.tables))
    for number, row in enumerate(mixed.rows):
        answer = slots.run({**feeds, **row, "adapter_strength": np.ones(1, np.float32)})[mixed.subject.output]
        found[mixed.ids == number] = answer[mixed.ids == number]
    assert max(mixed.errors(found)) <= LIMIT


def test_a_site_without_a_batch_is_refused() -> None:
    with pytest.raises(PlanError, match=r"reads what is the same for every row of a batch.*export a bundle for it"):
        assert Mixed(Subject(ARCHITECTURES["DeBERTa-v2"])).layout
