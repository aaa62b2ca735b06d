"""Other architectures than the demo's, tiny and randomly initialised: exported, found, planned, folded, compared."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from deployfa import VeFAConfig, capture
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.plan import NORM, OWN_WEIGHT, SIDE_OP
from deployfa.training.base import Base
from deployfa.training.base_graph import export_base_graph, probe
from deployfa.training.reference import attach

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 100, "num_labels": 3}
WIDE = {**SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT_SITES = ["query", "key", "value", "dense"]

#: name → (class, config, sites, head, sites that fold into their own weight, sites that can fold into a norm)
MODELS = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**WIDE), BERT_SITES, "classifier", 13, 0),
    "roberta": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(**WIDE, max_position_embeddings=66),
        BERT_SITES,
        "classifier",
        12,
        0,
    ),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(**SIZES, dim=32, hidden_dim=64, n_layers=2, n_heads=4),
        ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
        "classifier",
        12,
        0,
    ),
    # one layer called three times: every call reads one weight
    "albert": (
        tf.AlbertForSequenceClassification,
        tf.AlbertConfig(**{**WIDE, "num_hidden_layers": 3}, embedding_size=16),
        [*BERT_SITES, "ffn", "ffn_output"],
        "classifier",
        6,
        0,
    ),
    "electra": (
        tf.ElectraForSequenceClassification,
        tf.ElectraConfig(**WIDE, embedding_size=16),
        BERT_SITES,
        "classifier",
        12,
        0,
    ),
    "deberta-v2": (
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(**WIDE, type_vocab_size=0),
        ["query_proj", "key_proj", "value_proj", "dense"],
        "classifier",
        13,
        0,
    ),
    # pre-norm blocks: q, k, v on one norm, gate and up on the other; Conv1D sites read a (batch * sequence, k) view
    "gpt2": (
        tf.GPT2ForSequenceClassification,
        tf.GPT2Config(
            **SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
        ["c_attn", "c_fc", "c_proj"],
        "score",
        8,
        4,
    ),
    "llama-gqa": (
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig(**WIDE, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "score",
        14,
        10,
    ),
    "modernbert": (
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig(
            **WIDE, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        ),
        ["Wqkv", "Wo", "Wi"],
        "classifier",
        8,
        3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_site_folds_exactly(name: str) -> None:
    kind, config, sites, head, weights, norms = MODELS[name]
    torch.manual_seed(0)
    base = kind(config).eval()
    adapted = peft.get_peft_model(
        copy.deepcopy(base), VeFAConfig(target_modules=sites, modules_to_save=[head], share_input=True)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "vefa_lambda" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapter = capture(adapted)
    graph = export_base_graph(Base(base, name, "text-classification", ()))
    feeds, plain, _ = probe(Base(base, name, "text-classification", ()))
    tensors = {key: torch.from_numpy(array) for key, array in feeds.items()}
    with torch.inference_mode():
        truth = attach(copy.deepcopy(base).double(), adapter)(**tensors).logits.numpy()
        single = attach(copy.deepcopy(base), adapter)(**tensors).logits.numpy()
    noise = np.linalg.norm(single - truth)
    assert np.linalg.norm(plain - truth) > 100 * noise, "the adapter does something"
    for prefer, expected in (("own-weight", (weights, 0)), ("smallest-patch", (weights - norms, norms))):
        plan = make_plan(graph, adapter, prefer=prefer)
        assert (plan.count(OWN_WEIGHT), plan.count(NORM), plan.count(SIDE_OP)) == (*expected, 0)
        (found,) = evaluate(apply_adapter(graph, adapter, plan), [feeds])
        # the folded weights are rounded once to float32, the rest is float64: less than a run that rounds everything
        assert np.linalg.norm(found["logits"] - truth) <= noise
