"""Small decoders with a tokenizer of their own, written as directories that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit
from deployfa.preprocess.sentences import SENTENCES
from deployfa.training.base import base_fingerprint, load_base

__all__ = ["KINDS", "random_vefa", "write_decoder"]

END = "<end>"


def _llama(words: int) -> Any:
    """Two key-value heads for four query heads, weights tied."""
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=words, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def _gpt2(words: int) -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=words, n_embd=32, n_layer=2, n_head=4, n_positions=96, initializer_range=0.3,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


KINDS = {"llama": _llama, "gpt2": _gpt2}


def write_decoder(folder: Path, kind: str) -> Path:
    """A random model of ``kind``, the same at every call, and a byte-level tokenizer trained on sentences."""
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    torch.manual_seed(0)
    KINDS[kind](bpe.get_vocab_size()).save_pretrained(folder)
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot:"
    tokenizer.save_pretrained(folder)
    return folder


def random_vefa(folder: Path, seed: int = 0) -> Adapter:
    """λ of every linear layer in a block, drawn."""
    base = load_base(folder, "text-generation", labels=None)
    generator = np.random.default_rng(seed)
    edits = {}
    for name, module in base.model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or not any(part.isdigit() for part in name.split(".")):
            continue
        features = weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
        edits[name] = Edit(lam=generator.normal(0, 0.2, features).astype(np.float32))
    return Adapter(
        method="vefa",
        edits=edits,
        modules={},
        base=BaseReference(
            name=str(folder), fingerprint=base_fingerprint(base.model), architecture=base.architecture,
            task="text-generation",
        ),
        labels=(),
        config={},
        training={},
        found="drawn",
    )  # fmt: skip
