"""A PyTorch contender beside a graph: a tiny BERT with an adapter, in a worker of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from deployfa.adapter import Adapter, BaseReference
from deployfa.bench import Contender, Shape, bench
from deployfa.edits import Edit

HIDDEN, INNER, LABELS = 32, 64, 2
SITE = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=32,
    )
    folder = tmp_path_factory.mktemp("bert") / "model"
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def save_adapter(path, model, site):
    lam = np.random.default_rng(0).standard_normal(HIDDEN).astype(np.float32)
    adapter = Adapter("vefa", {site: Edit(lam=lam)}, base=BaseReference(name=str(model)), labels=("no", "yes"))
    return adapter.save(path)


def test_a_module_is_timed_and_counted_beside_a_graph(make_graph, model, tmp_path):
    adapter = save_adapter(tmp_path / "a.safetensors", model, SITE)
    report = bench(
        [Contender("graph", graph=make_graph()), Contender("pytorch", kind="torch", adapter=adapter, model=str(model))],
        [Shape(2, 8)],
        threads=1,
        launches=1,
        min_samples=12,
        vocabulary=50,
        bare_matmul=False,
    )
    result = report.results[1]
    assert result.contender == "pytorch" and result.samples >= 12 and result.p50_ms > 0
    tokens = 2 * 8
    layer = 4 * 2 * tokens * HIDDEN**2 + 2 * 2 * tokens * HIDDEN * INNER + 4 * 2 * 8 * 8 * HIDDEN
    pooler_and_head = 2 * 2 * HIDDEN * HIDDEN + 2 * 2 * HIDDEN * LABELS
    assert result.flops == layer + pooler_and_head
    weights = (model / "model.safetensors").stat().st_size
    assert report.contenders[1].size_bytes == weights + adapter.stat().st_size
