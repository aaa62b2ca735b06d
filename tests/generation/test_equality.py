"""Greedy generation held against PyTorch: equal is found equal, and a difference is found where it is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from deployfa.generation.equality import compare_greedy, torch_greedy
from deployfa.generation.generator import Generator
from deployfa.parity.measures import LIMIT

from .tiny import EOS, Tiny

PROMPTS = [f"{first} {second}" for first in ("the cat", "wer", "log;", "naïve") for second in ("sat on", "ate", "x")]
NOISE = 1e-5


def compared(generator: Generator, model, prompts=PROMPTS, **more):
    return compare_greedy(generator, model, prompts, max_new_tokens=24, noise_max_abs=NOISE, **more)


def changed(tiny: Tiny, by: float):
    """The model with some tokens more likely."""
    model = copy.deepcopy(tiny.torch)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[40:80] *= 1 + by
    return model


def test_the_same_model_generates_the_same(tiny):
    report = compared(tiny.base, tiny.torch)
    assert (report.equal, report.prompts, report.passed) == (len(PROMPTS), len(PROMPTS), True)
    assert all(each.equal and each.tokens > 2 and each.our_gap is None for each in report.comparisons)


def test_another_model_is_seen_where_it_parts(tiny):
    model = changed(tiny, 0.3)
    report = compared(tiny.base, model)
    assert not report.passed and report.equal < len(PROMPTS)
    each = next(each for each in report.comparisons if not each.equal)
    ids = tiny.tokenizer.encode(each.prompt)
    ours, theirs = (torch_greedy(each, ids, 24, [EOS]) for each in (tiny.torch, model))
    assert ours[: each.position] == theirs[: each.position]
    assert (each.ours, each.theirs) == (ours[each.position], theirs[each.position])
    with torch.inference_mode():
        logits = [m(torch.tensor([ids + ours[: each.position]])).logits[0, -1] for m in (tiny.torch, model)]
    assert each.our_gap == pytest.approx(float(logits[0][each.ours] - logits[0][each.theirs]), abs=1e-4)
    assert each.their_gap == pytest.approx(float(logits[1][each.theirs] - logits[1][each.ours]), abs=1e-4)


def test_a_tie_that_noise_can_close_is_explained(llama, monkeypatch):
    """Two tokens with the same weights but for a little: which one comes first is noise's choice."""
    ids = llama.tokenizer.encode("the cat")
    best = torch_greedy(llama.torch, ids, 1, [])[0]
    twin = best + 1

    def model(by: float):
        found = copy.deepcopy(llama.torch)
        found.lm_head.weight = torch.nn.Parameter(found.lm_head.weight.detach().clone())
        with torch.no_grad():
            found.lm_head.weight[twin] = found.lm_head.weight[best] * (1 + by)
        return found

    def scored(by: float, noise: float):
        """Ours as if the twin had not been made."""
        return compare_greedy(llama.base, model(by), ["the cat"], max_new_tokens=1, noise_max_abs=noise).comparisons[0]

    theirs = scored(1e-3, NOISE)
    assert theirs.theirs == twin and theirs.ours == best and theirs.their_gap > 0
    # in our graph the twin is another token, so the gap is real, whatever the other runtime says
    assert not theirs.explained
    enough = (theirs.our_gap + theirs.their_gap) / (4 * LIMIT)
    assert scored(1e-3, 1.01 * enough).explained and not scored(1e-3, 0.99 * enough).explained


def test_an_answer_that_goes_on_is_a_difference_that_noise_does_not_explain(tiny):
    (whole,) = tiny.base.generate([_request(tiny)])
    end = whole.token_ids[3]
    stopping = tiny.generator(tiny.base.decoder.runner, eos_token_ids=[end])
    report = compare_greedy(stopping, tiny.torch, ["the cat"], max_new_tokens=24, noise_max_abs=1e9)
    assert report.passed and report.comparisons[0].equal
    # a generator that does not stop where it says that it does
    deaf = Generator(stopping.decoder, stopping.tokenizer, stopping.settings)
    deaf._stops = frozenset()
    report = compare_greedy(deaf, tiny.torch, ["the cat"], max_new_tokens=24, noise_max_abs=1e9)
    (each,) = report.comparisons
    assert each.theirs is None and each.ours is not None and not each.explained and not report.passed


def test_the_adapter_of_a_pack_and_of_slots_is_the_one_that_is_compared(tiny):
    from deployfa.training.reference import attach

    model = attach(copy.deepcopy(tiny.torch), tiny.adapters["b"])
    assert compared(tiny.pack, model, adapter="b").equal == len(PROMPTS)
    assert compared(tiny.pack, model, adapter="a").equal < len(PROMPTS) // 2
    generator, adapters = tiny.slots
    assert compared(generator, model, slot=adapters["b"]).equal == len(PROMPTS)
    assert not compared(generator, model, slot=None).passed


def _request(tiny: Tiny):
    from deployfa.generation.generator import Request
    from deployfa.generation.options import Options

    return Request(prompt="the cat", options=Options(max_new_tokens=24))


def test_gaps_are_after_the_same_text(tiny, monkeypatch):
    """Logits of another place would say something else."""
    model = changed(tiny, 0.3)
    seen = []
    from deployfa.generation import equality

    original = equality._torch_logits
    monkeypatch.setattr(equality, "_torch_logits", lambda m, ids: seen.append(list(ids)) or original(m, ids))
    report = compared(tiny.base, model)
    parted = [each for each in report.comparisons if not each.equal]
    for each, ids in zip(parted, seen, strict=True):
        prompt = tiny.tokenizer.encode(each.prompt)
        assert ids == prompt + torch_greedy(model, prompt, 24, [EOS])[: each.position]
        assert each.our_gap >= 0 and each.their_gap >= 0
        assert np.isfinite([each.our_gap, each.their_gap]).all()
