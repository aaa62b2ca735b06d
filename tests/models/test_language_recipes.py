"""The sites of a recipe are the linear layers of the blocks, all of them and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as tf

from deployfa.models import load_recipe
from deployfa.training.options import METHODS

SMALL = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
#: Recipe, class, config, linear layers a block.
MODELS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "gpt2": ("gpt2", "GPT2", GPT2, 4),
    "llama": ("llama", "Llama", SMALL, 7),
    "smollm2": ("llama", "Llama", {**SMALL, "tie_word_embeddings": True}, 7),
    "mistral": ("llama", "Mistral", SMALL, 7),
    "qwen2": ("llama", "Qwen2", SMALL, 7),
    "qwen3": ("llama", "Qwen3", {**SMALL, "head_dim": 8}, 7),
    "gemma": ("llama", "Gemma", {**SMALL, "head_dim": 8}, 7),
    # q, k and v in one, gate and up in one
    "phi3": ("llama", "Phi3", SMALL, 4),
}


def made(name: str) -> tuple[str, Any, int]:
    recipe, kind, config, count = MODELS[name]
    model_class = getattr(tf, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))
    with torch.device("meta"):
        return load_recipe(recipe).sites, model_class(getattr(tf, f"{kind}Config")(**config)), count


@pytest.mark.parametrize("name", list(MODELS))
def test_sites_are_the_linear_layers_of_the_blocks(name: str) -> None:
    sites, model, count = made(name)
    # as PEFT matches a regular expression
    found = {path for path, _ in model.named_modules() if re.fullmatch(sites, path)}
    linear = {path for path, module in model.named_modules() if type(module).__name__ in {"Linear", "Conv1D"}}
    assert found == linear - {"lm_head"}
    assert len(found) == 2 * count


@pytest.mark.parametrize(("name", "other"), [("gpt2", "llama"), ("llama", "gpt2")])
def test_a_recipe_for_another_model_finds_nothing(name: str, other: str) -> None:
    _, model, _ = made(name)
    sites = load_recipe(other).sites
    assert not [path for path, _ in model.named_modules() if re.fullmatch(sites, path)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_recipe_of_a_language_model_is_whole(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.name, recipe.task) == (name, "text-generation")
    assert set(METHODS) <= set(recipe.learning_rate)
    assert recipe.asset == {"gpt2": None, "llama": "smollm2"}[name]
