"""Where the noise of a truth comes from: weights that move, whatever else stays, and the model that was passed in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn

from deployfa.adapter import Adapter
from deployfa.edits import Array, Edit
from deployfa.parity import truth
from deployfa.parity.cases import Case
from deployfa.parity.noise import FEWEST_RUNS, MOST_RUNS
from deployfa.parity.truth import graph_truth, neighbouring
from deployfa.training.base import Base
from deployfa.training.base_graph import export_base_graph

#: A decoder of 2018: its causal mask is a float tensor of zeros and ones, which it takes times 1e4.
MASK = "transformer.h.0.attn.bias"
SITE = "transformer.h.0.mlp.c_fc"
#: Two float32 runs are not so many times apart: the masks make it 19.
FAR = 4


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(
        vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    return Base(transformers.OpenAIGPTForSequenceClassification(config).eval(), "gpt", "text-classification", ())


@pytest.fixture(scope="module")
def graph(base: Base) -> ir.Model:
    return export_base_graph(base)


@pytest.fixture
def adapter() -> Adapter:
    return Adapter("vefa", {SITE: Edit(lam=np.random.default_rng(0).normal(0, 0.3, 16).astype(np.float32))})


@pytest.fixture
def cases() -> list[Case]:
    ids = np.random.default_rng(1).integers(1, 60, (6, 9)).astype(np.int64)
    return [Case({"input_ids": ids, "attention_mask": np.ones_like(ids)})]


def values(model: ir.Model) -> dict[str, Array]:
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: np.array(tensor.numpy()) for name, tensor in found.items() if tensor is not None}


def test_weights_move_by_little_and_nothing_else(graph: ir.Model) -> None:
    before = values(graph)
    assert before[MASK].dtype == np.float32 and before[MASK].ndim == 4
    one, other = neighbouring(graph, 1), neighbouring(graph, 2)
    assert MASK not in one
    assert {"transformer.tokens_embed.weight", f"{SITE}.weight"} <= set(one) == set(other)
    for name, moved in one.items():
        np.testing.assert_allclose(moved, before[name], rtol=2e-7, atol=0)
        assert not np.array_equal(moved, before[name]) and not np.array_equal(moved, other[name])
    after = values(graph)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_no_run_is_of_another_order(graph: ir.Model, adapter: Adapter, cases: list[Case]) -> None:
    _, one = graph_truth(graph, adapter, cases, runs=1)
    _, noise = graph_truth(graph, adapter, cases)
    assert one.relative <= noise.relative < FAR * one.relative


def test_a_mask_that_moved_would_be_seen(
    graph: ir.Model, adapter: Adapter, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above, with every matrix and kernel moved, the masks among them."""
    _, one = graph_truth(graph, adapter, cases, runs=1)
    monkeypatch.setattr(truth, "_weighs", lambda value: True)
    _, noise = graph_truth(graph, adapter, cases)
    assert noise.relative > FAR * one.relative


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Mapping[str, Any]]]:
    """Of every float32 run of PyTorch: whether oneDNN was on, and the weights."""
    found: list[tuple[bool, Mapping[str, Any]]] = []
    running = truth._run

    def noting(model: nn.Module, cases: list[Case]) -> list[Array]:
        onednn: Any = torch.backends.mkldnn
        found.append((onednn.enabled, {name: each.clone() for name, each in model.state_dict().items()}))
        return running(model, cases)

    monkeypatch.setattr(truth, "_run", noting)
    return found


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN")
def test_pytorch_runs_other_weights_by_turns_with_and_without_onednn(
    base: Base, adapter: Adapter, cases: list[Case], seen: list[tuple[bool, Mapping[str, Any]]]
) -> None:
    before = {name: each.clone() for name, each in base.model.state_dict().items()}
    for seed in range(3):
        truth._float32_run(base, adapter, cases, seed)
    assert [on for on, _ in seen] == [True, False, True]
    (_, first), (_, second), (_, third) = seen
    assert all(torch.equal(first[name], each) for name, each in before.items())
    for name in ("transformer.tokens_embed.weight", f"{SITE}.weight"):
        assert not torch.equal(first[name], second[name]) and not torch.equal(second[name], third[name])
        torch.testing.assert_close(second[name], first[name], rtol=2e-7, atol=0)
    for name in (MASK, f"{SITE}.bias"):
        assert name not in first or torch.equal(first[name], second[name])
    assert all(torch.equal(each, before[name]) for name, each in base.model.state_dict().items())
    assert torch.backends.mkldnn.enabled


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN")
def test_onednn_is_on_again_after_a_run_that_failed(base: Base, adapter: Adapter) -> None:
    with pytest.raises(Exception, match=r".+"):
        truth._float32_run(base, adapter, [Case({"input_ids": np.full((1, 2), 10**6)})], 1)
    assert torch.backends.mkldnn.enabled


def test_a_truth_of_pytorch_is_measured_on_several_runs(
    base: Base,
    adapter: Adapter,
    cases: list[Case],
    seen: list[tuple[bool, Mapping[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployfa.training.base.load_base_of", lambda adapter, model: base)
    monkeypatch.setattr("deployfa.training.reference.check_base", lambda *_, **__: None)
    truth.torch_truth("gpt", adapter, cases)
    # and one in float64, one of the base
    assert FEWEST_RUNS + 2 <= len(seen) <= MOST_RUNS + 2
