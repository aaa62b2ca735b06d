"""SmolLM2-135M with an adapter folded in: what it generates is what PyTorch does, token by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deployfa.base_models import base_model
from deployfa.bundle import Bundle
from deployfa.edits import Edit
from deployfa.generation.equality import verify_greedy
from deployfa.generation.generator import Request, open_generator
from deployfa.generation.options import Options
from deployfa.pipeline import export

from ..training.tiny_decoders import random_vefa

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "Water boils at",
    "The three most important things in life are",
    "In 1969, the first",
    "My favourite recipe for soup begins with",
    "The difference between a virus and a bacterium is",
    "To be or not to be,",
    "import numpy as np\n\ndef",
    "The stock market fell today because",
    "Dear Sir or Madam,",
    "A triangle with sides 3, 4 and",
    "Photosynthesis is the process by which",
    "The best way to learn a language is",
    "She opened the door and",
    "SELECT name FROM users WHERE",
    "The history of Rome begins",
    "Question: What is the speed of light?\nAnswer:",
    "Der schnelle braune Fuchs",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    adapter = random_vefa(base_model("smollm2"))
    small = {site: Edit(lam=0.1 * edit.lam) for site, edit in adapter.edits.items()}
    out: Path = tmp_path_factory.mktemp("smollm2") / "small.bundle"
    return export(dataclasses.replace(adapter, edits=small), out, optimize="none").bundle


@pytest.mark.slow
def test_twenty_prompts_generate_the_tokens_of_pytorch(bundle) -> None:
    report = verify_greedy(bundle, prompts=PROMPTS, max_new_tokens=64)
    parted = [each for each in report.comparisons if not each.equal]
    assert report.passed, parted
    # noise closes a gap now and then, not as a rule
    assert len(parted) <= 1, parted


@pytest.mark.slow
def test_a_long_prompt_read_in_pieces_is_the_same(bundle) -> None:
    generator = open_generator(bundle)
    asked = [
        Request(prompt=" ".join(PROMPTS), options=Options(max_new_tokens=16)),
        Request(prompt=PROMPTS[0], options=Options(max_new_tokens=32)),
    ]
    whole = generator.generate(asked)
    for chunk in (7, 64):
        assert [each.token_ids for each in generator.generate(asked, chunk=chunk)] == [e.token_ids for e in whole]


@pytest.mark.slow
def test_a_chat_answers_in_whole_words(bundle) -> None:
    from deployfa.generation.chat import Message, open_chat_template, render

    template, special = open_chat_template(bundle)
    (prompt,) = render(template, [[Message("user", "Say hello in three languages.")]], special)
    assert prompt.endswith("<|im_start|>assistant\n") and "Say hello" in prompt
    generator = open_generator(bundle)
    pieces = list(generator.stream([Request(prompt=prompt, special=False, options=Options(max_new_tokens=24))]))
    text = "".join(piece.text for piece in pieces)
    assert text == generator.tokenizer.decode([piece.token for piece in pieces])
    assert text.strip() and "\ufffd" not in text
