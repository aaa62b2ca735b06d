"""Tiny decoders of two kinds, exported for real, with a tokenizer of their own, adapters, and every kind of bundle's
runner."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers as tf

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank
from deployfa.generation.decoder import Decoder
from deployfa.generation.generator import Generator
from deployfa.generation.text import Tokenizer
from deployfa.graph import apply_adapter, find_sites, make_plan
from deployfa.graph.idle import with_idle_branch, with_row
from deployfa.graph.row_defaults import attach_defaults, default_strength
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.row_ops import add_slots, add_tables
from deployfa.graph.storage import save_graph
from deployfa.mixed import MixedRunner
from deployfa.preprocess import Generation
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.slots import SlotRunner
from deployfa.tables import base_row, row_of

EOS, POSITIONS = 0, 96
TEXT = "the cat sat on the mat and the dog ate the log; wer früh übt, größer wird — naïve café 日本語 😀 " * 3


def make_tokenizer(folder: Path) -> int:
    """A byte-level BPE with a special token ``<eos>``, id 0, written to ``folder``; returns how many tokens it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return int(tokenizer.get_vocab_size())


def _gpt2(size: int) -> Any:
    small = {"vocab_size": size, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**small, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.3))


def _llama(size: int) -> Any:
    small = {"vocab_size": size, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**small, **heads, **ends, initializer_range=0.3))


MODELS = {"GPT-2": _gpt2, "Llama": _llama}


@cache
def torch_model(name: str, size: int) -> Any:
    torch.manual_seed(0)
    return MODELS[name](size).eval()


@cache
def decoder_graph(name: str, size: int) -> ir.Model:
    """The one graph that reads a prompt and goes on, with its final names; do not change it."""
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_prefill_decode

    ids = torch.randint(0, size, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        parts = decompose_prefill_decode(
            torch_model(name, size), {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True
        )
        model, feeds = parts["decode"]
        feeds = {**feeds, "logits_to_keep": torch.tensor([0, 1])}
        program = OnnxExporter().export(model, feeds, OnnxConfig(dynamic=True)).program
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = re.sub(
            r"^input\.past_key_values\.layers\.(\d+)\.(key|value)s$", r"past_key_values.\1.\2", value.name
        )
        value.name = re.sub(r"^output\.past_key_values\.layers\.(\d+)\.(key|value)s$", r"present.\1.\2", value.name)
    return program


@dataclass(frozen=True)
class Tables:
    """What ``MixedRunner`` asks a bundle's manifest for."""

    layout: Any
    adapters: Any
    inputs: bool = True
    file: str | None = None


class Tiny:
    """One model, its adapters ``a`` and ``b``, and a generator of every kind, made when asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        size = make_tokenizer(folder)
        self.tokenizer = Tokenizer(folder)
        self.graph, self.torch = decoder_graph(name, size), torch_model(name, size)
        self.settings = Generation(eos_token_ids=[EOS], pad_token_id=EOS, max_positions=POSITIONS, chat_template=False)
        self.adapters = {"a": self._adapter(1), "b": self._adapter(2)}

    def _adapter(self, seed: int) -> Adapter:
        random = np.random.default_rng(seed)

        def numbers(*shape: int) -> Array:
            return random.standard_normal(shape).astype(np.float32)

        edits: dict[str, Edit] = {}
        for number, (path, site) in enumerate(find_sites(self.graph).items()):
            k, d = site.in_features, site.out_features
            low = LowRank(numbers(2, k) / k**0.5, 0.3 * numbers(d, 2), 1.0)
            edits[path] = Edit(output_low_rank=low) if number % 2 else Edit(lam=0.3 * numbers(k))
        return Adapter("mixture", edits, base=BaseReference(fingerprint="sha256:of the base"))

    def generator(self, runner: OnnxRuntimeRunner | SlotRunner | MixedRunner, **settings: Any) -> Generator:
        import msgspec

        return Generator(Decoder(runner), self.tokenizer, msgspec.structs.replace(self.settings, **settings))

    def _saved(self, model: ir.Model) -> Path:
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        return save_graph(model, folder, share_equal=True)

    def runner(self, model: ir.Model) -> OnnxRuntimeRunner:
        return OnnxRuntimeRunner(self._saved(model), threads=1, spinning=False)

    @cached_property
    def base(self) -> Generator:
        return self.generator(self.runner(self.graph))

    @cached_property
    def alone(self) -> dict[str, Generator]:
        """Each adapter in a graph of its own; ``base`` among them."""
        return {"base": self.base} | {
            name: self.generator(self.runner(apply_adapter(self.graph, each, make_plan(self.graph, each))))
            for name, each in self.adapters.items()
        }

    @cached_property
    def pack(self) -> Generator:
        """``base``, ``a`` and ``b`` in the rows 0 to 2 of tables that are bound."""
        from types import SimpleNamespace

        layout = make_layout(self.graph, self.adapters)
        zero = base_row(layout, base_heads(self.graph, layout))
        weights = base_weights(self.graph, layout)
        rows = [zero, *(row_of(each, layout, zero, weights=weights) for each in self.adapters.values())]
        bound = {name: np.stack([row[name] for row in rows]) for name in layout.shapes()}
        members = [SimpleNamespace(name=name, labels=()) for name in ("base", *self.adapters)]
        manifest = SimpleNamespace(tables=Tables(layout, members), target="onnxruntime-cpu")
        tables = add_tables(self.graph, layout)
        attach_defaults(tables, default_strength())
        path = self._saved(tables)
        bundle: Any = SimpleNamespace(path=path.parent, graph=path, bound=bound, manifest=manifest)
        return self.generator(MixedRunner(bundle, threads=1, spinning=False))

    @cached_property
    def slots(self) -> tuple[Generator, dict[str, Any]]:
        """A generator with slots, and the adapters that fit them."""
        layout = make_layout(self.graph, {"a": self.adapters["a"]}, mixed=False)
        zero = base_row(layout, base_heads(self.graph, layout))
        weights = base_weights(self.graph, layout)
        whole = with_row(with_idle_branch(self.graph, add_slots(self.graph, layout)), zero)
        runner = SlotRunner(self._saved(whole), layout, threads=1, spinning=False)
        loaded = {
            name: runner.load(row_of(each, layout, zero, weights=weights)) for name, each in self.adapters.items()
        }
        return self.generator(runner), loaded
