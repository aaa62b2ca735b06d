"""Checkpoints that PEFT writes and that are no edits: one line each, with the name and the way out."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from deployfa.adapter import Adapter
from deployfa.adapter.peft_refusals import MERGE, TRAIN, refuse_method
from deployfa.edits import Edit, LowRank
from deployfa.errors import AdapterFormatError

QUERY = ["query"]


def refusal(path):
    with pytest.raises(AdapterFormatError) as caught:
        Adapter.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


METHODS = {
    "VeRA": peft.VeraConfig(r=2, target_modules=QUERY),
    "AdaLoRA": peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=QUERY),
    "LoHa": peft.LoHaConfig(r=2, target_modules=QUERY),
    "LoKr": peft.LoKrConfig(r=2, target_modules=QUERY),
    "OFT": peft.OFTConfig(r=2, oft_block_size=0, target_modules=QUERY),
    "BOFT": peft.BOFTConfig(boft_block_size=2, target_modules=QUERY),
    "HRA": peft.HRAConfig(r=2, target_modules=QUERY),
    "FourierFT": peft.FourierFTConfig(n_frequency=8, target_modules=QUERY),
    "VB-LoRA": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, target_modules=QUERY),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_merges(tmp_path, bert, name):
    """The way out is real: PEFT merges each of these."""
    adapted = get_peft_model(copy.deepcopy(bert), copy.deepcopy(METHODS[name]))
    adapted.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert f"is a PEFT {name} checkpoint; deployfa reads ia3, lora, lorfa, vefa; {MERGE}" in message
    merged = adapted.merge_and_unload()
    assert type(merged) is type(bert) and not any("base_layer" in key for key in merged.state_dict())


def test_prompt_tuning_has_nothing_to_merge(tmp_path, gpt2):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(copy.deepcopy(gpt2), config).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert (
        f"is a PEFT prompt tuning checkpoint, which adds trained tokens to the input and edits no layer; {TRAIN}"
        in (message)
    )


def test_every_method_of_peft_is_known_by_name():
    ours = {"IA3", "LORA", "VEFA", "LORFA"}
    for kind in {str(kind.value) for kind in PEFT_TYPE_TO_TUNER_MAPPING} - ours:
        message = str(refuse_method("here", kind, ours))
        assert MERGE in message or TRAIN in message
        assert "if PEFT can" not in message, kind
    assert "is a PEFT NEW checkpoint; deployfa reads" in str(refuse_method("here", "NEW", ours))


LORAS = {
    "is a DoRA checkpoint": LoraConfig(target_modules=QUERY, use_dora=True),
    "comes from lora_bias=True": LoraConfig(target_modules=QUERY, lora_bias=True),
    "comes from bias='all'": LoraConfig(target_modules=QUERY, bias="all"),
    "comes from bias='lora_only'": LoraConfig(target_modules=QUERY, bias="lora_only"),
    "is LoRA of an embedding": LoraConfig(target_modules=["query", "word_embeddings"]),
    "comes from trainable_token_indices": LoraConfig(
        target_modules=QUERY, trainable_token_indices={"word_embeddings": [1]}
    ),
    "init_lora_weights='pissa'": LoraConfig(r=2, target_modules=QUERY, init_lora_weights="pissa"),
    "init_lora_weights='pissa_niter_4'": LoraConfig(r=2, target_modules=QUERY, init_lora_weights="pissa_niter_4"),
    "init_lora_weights='olora'": LoraConfig(r=2, target_modules=QUERY, init_lora_weights="olora"),
    "with kasa_config": LoraConfig(r=2, target_modules=QUERY, kasa_config=peft.KasaConfig()),
    "with velora_config": LoraConfig(r=2, target_modules=QUERY, velora_config=peft.VeloraConfig(num_groups=2)),
}


@pytest.mark.parametrize("part", LORAS)
def test_loras_that_are_more_than_s_b_a(tmp_path, bert, part):
    get_peft_model(copy.deepcopy(bert), copy.deepcopy(LORAS[part])).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert part in message and MERGE in message


def test_lora_inside_multihead_attention(tmp_path):
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention"])).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "inside torch.nn.MultiheadAttention" in message and MERGE in message


def test_a_resized_embedding(tmp_path, bert):
    adapted = get_peft_model(copy.deepcopy(bert), LoraConfig(r=2, target_modules=QUERY))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "is a whole weight that modules_to_save does not name" in refusal(tmp_path)


def test_pissa_without_the_refusal_would_be_wrong(tmp_path, bert, same_effect):
    """s B A of a PiSSA checkpoint on the original weights is not what PEFT computes, and its own conversion is."""
    config = LoraConfig(r=2, target_modules=QUERY, init_lora_weights="pissa")
    adapted = get_peft_model(copy.deepcopy(bert), config)
    adapted.peft_config["default"].init_lora_weights = True  # as PEFT's documentation asks for
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    state = {name: tensor.numpy() for name, tensor in peft.get_peft_model_state_dict(adapted).items()}
    edits = {}
    for name, a in state.items():
        if name.endswith("lora_A.weight"):
            b = state[name.replace("lora_A", "lora_B")]
            site = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            edits[site] = Edit(output_low_rank=LowRank(a, b, 8 / 2))
    theirs = copy.deepcopy(adapted).double().eval()
    assert not same_effect(bert, theirs, Adapter("lora", edits))
    adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = Adapter.load(tmp_path / "plain")
    assert {edit.output_low_rank.rank for edit in adapter.edits.values()} == {4}
    from deployfa.training.reference import attach

    feed = {"input_ids": torch.arange(12).reshape(2, 6)}
    with torch.inference_mode():
        expected = theirs(**feed).logits.numpy()
        found = attach(copy.deepcopy(bert).double(), adapter)(**feed).logits.numpy()
    # the residual W - s B A was rounded to float32 once
    assert np.abs(found - expected).max() <= 64 * 2.0**-24 * np.abs(expected).max()
