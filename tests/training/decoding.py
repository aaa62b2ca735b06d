"""Generating with two graphs, one that reads the prompt and one that goes on: small models, and how to run them."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers as tf

from deployfa.edits import Array

Values = dict[str, Array]
#: A graph's name and what it is fed → what it answers.
Run = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
BATCH, STEPS = 8, 3


def _gpt2() -> Any:
    small = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**small, bos_token_id=99, eos_token_id=99))


def _llama() -> Any:
    small = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    )


MODELS = {"GPT-2": _gpt2, "Llama": _llama}


@cache
def graphs_of(name: str) -> dict[str, ir.Model]:
    """``prefill`` and ``decode`` of a model in ``MODELS``, as transformers exports them; do not change them."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.randint(0, 99, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = OnnxExporter().export_for_generation(
            model, {"input_ids": ids, "attention_mask": mask}, OnnxConfig(dynamic=True), multi_token_decode=True
        )
    return {name: component.program for name, component in exported.components.items()}


def generate(run: Run, *, seed: int = 5) -> list[Mapping[str, Array]]:
    """What ``run`` answers to a prompt and to ``STEPS`` more tokens, the same ones whoever answers; its caches are
    handed on."""
    prompt = 6
    tokens = np.random.default_rng(seed).integers(0, 99, (BATCH, prompt + STEPS))
    mask = np.ones_like(tokens)
    mask[::3, :2] = 0
    places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    feeds: Values = {"input_ids": tokens[:, :prompt]}
    feeds |= {"attention_mask": mask[:, :prompt], "position_ids": places[:, :prompt]}
    answers = [run("prefill", feeds)]
    for step in range(prompt, prompt + STEPS):
        last = answers[-1]
        caches = {f"input.{n.removeprefix('output.')}": array for n, array in last.items() if "past_key_values" in n}
        feeds = {"input_ids": tokens[:, step : step + 1], "position_ids": places[:, step : step + 1], **caches}
        answers.append(run("decode", {**feeds, "attention_mask": mask[:, : step + 1]}))
    return answers


def next_logits(answers: list[Mapping[str, Array]]) -> list[Array]:
    """Those of the token to come, at every step; (BATCH, vocabulary)."""
    return [found["logits"][:, -1] for found in answers]
