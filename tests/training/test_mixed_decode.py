"""Mixed batches while generating: one table serves the graph that reads the prompt and the one that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank
from deployfa.graph import apply_adapter, find_sites, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_tables
from deployfa.parity.measures import LIMIT, normwise
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.tables import Layout, base_row, row_of

from .decoding import MODELS, generate, graphs_of, next_logits

IDS = np.array([0, 1, 2, 3, 1, 2, 3, 0])


def _session(graph: ir.Model) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(ir.to_proto(graph).SerializeToString(), threads=1, spinning=False, optimize=False)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_mixed_batch_generates_as_each_adapter_alone(model: str) -> None:
    graphs = graphs_of(model)
    sites = find_sites(graphs["decode"])
    assert set(sites) == set(find_sites(graphs["prefill"])) and len(sites) > 8
    random = np.random.default_rng(0)

    def numbers(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    base = BaseReference(fingerprint="sha256:of the base")
    edits: dict[str, dict[str, Edit]] = {"vefa": {}, "lorfa": {}, "lora": {}}
    for path, site in sites.items():
        k, d = site.in_features, site.out_features
        edits["vefa"][path] = Edit(lam=0.3 * numbers(k), delta=0.1 * numbers(k))
        edits["lorfa"][path] = Edit(input_low_rank=LowRank(numbers(4, k) / k**0.5, 0.2 * numbers(k, 4), 1.0))
        edits["lora"][path] = Edit(output_low_rank=LowRank(numbers(2, k) / k**0.5, 0.2 * numbers(d, 2), 1.0))
    adapters = {name: Adapter(name, each, base=base) for name, each in edits.items()}
    layouts: dict[str, Layout] = {name: make_layout(graph, adapters) for name, graph in graphs.items()}
    assert layouts["prefill"].shapes() == layouts["decode"].shapes(), "one table serves both"
    layout = layouts["decode"]
    zero = base_row(layout, base_heads(graphs["decode"], layout))
    weights = base_weights(graphs["decode"], layout)
    rows = [zero, *(row_of(adapter, layout, zero, weights=weights) for adapter in adapters.values())]
    tables = {name: np.stack([row[name] for row in rows]) for name in layout.shapes()}
    sessions = {name: _session(add_tables(graph, layouts[name])) for name, graph in graphs.items()}

    def mixed(tables: Mapping[str, Array]) -> list[Array]:
        own = {**tables, "adapter_ids": IDS, "adapter_strength": np.ones(1, np.float32)}
        return next_logits(generate(lambda name, feeds: sessions[name].run({**feeds, **own})))

    found = mixed(tables)
    moved = mixed({name: np.concatenate([table[:3], table[3:] + 0.01]) for name, table in tables.items()})
    swapped = mixed({name: table[[0, 2, 1, 3]] for name, table in tables.items()})
    for number, adapter in enumerate([Adapter("base", {}), *adapters.values()]):
        alone = {
            name: apply_adapter(graph, adapter, make_plan(graph, adapter, placement="side-op"))
            for name, graph in graphs.items()
        }
        single = {name: _session(graph) for name, graph in alone.items()}
        doubles = next_logits(generate(lambda name, feeds: evaluate(alone[name], [feeds])[0]))  # noqa: B023
        singles = next_logits(generate(lambda name, feeds: single[name].run(feeds)))  # noqa: B023
        chosen = number == IDS
        for step, (one, double, plain) in enumerate(zip(found, doubles, singles, strict=True)):
            noise = normwise(plain.astype(np.float64), double)
            assert normwise(one[chosen].astype(np.float64), double[chosen]) <= LIMIT * noise, (adapter.method, step)
            # nobody else's numbers reach a row, by its cache neither
            assert np.array_equal(moved[step][chosen], one[chosen]) == (number != 3)
            if number in (1, 2):
                assert normwise(swapped[step][chosen].astype(np.float64), double[chosen]) > 1000 * LIMIT * noise
