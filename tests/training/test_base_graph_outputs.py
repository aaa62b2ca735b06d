"""What a classifier's base graph answers: its logits, and no cache of keys and values."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from deployfa.training.base import Base
from deployfa.training.base_graph import export_base_graph

SIZES = {"vocab_size": 50, "num_labels": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.slow
def test_a_decoder_with_a_head_has_one_output_and_keeps_its_config() -> None:
    torch.manual_seed(0)
    config = tf.GPT2Config(**SIZES, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = tf.GPT2ForSequenceClassification(config).eval()
    assert model.config.use_cache
    graph = export_base_graph(Base(model, "gpt2", "text-classification", ()))
    assert [output.name for output in graph.graph.outputs] == ["logits"]
    assert model.config.use_cache, "the caller's model is as it was"
