"""Sampling against transformers' own processors, and that a row's draws are its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from deployfa.edits import Array
from deployfa.errors import InputError, RuntimeTargetError
from deployfa.generation.options import Options
from deployfa.generation.sampling import Sampler, distribution, penalised

CASES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 7},
    "top-k of all": {"temperature": 1.0, "top_k": 100_000},
    "top-p": {"temperature": 1.0, "top_p": 0.83},
    "a top-p of one token": {"temperature": 0.2, "top_p": 1e-6},
    "min-p": {"temperature": 1.3, "min_p": 0.07},
    "min-p of one token": {"temperature": 1.0, "min_p": 1.0},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.4},
    "a bonus for repeating": {"temperature": 1.0, "repetition_penalty": 0.7},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    "flat, so that the first look is too short": {"temperature": 50.0, "top_p": 0.9},
}


def _theirs(logits: Array, seen: Array, options: Options) -> Array:
    """Probabilities (vocabulary,) after the processors of ``generate``, in its order."""
    steps: list[Any] = []
    if options.repetition_penalty != 1:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature != 1:
        steps.append(theirs.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        steps.append(theirs.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(theirs.TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(theirs.MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits)[None]
    for step in steps:
        scores = step(torch.from_numpy(seen)[None], scores)
    return np.asarray(scores[0].double().softmax(-1).numpy())


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("case", CASES)
def test_who_may_be_drawn_and_how_likely_is_as_in_transformers(case: str, vocabulary: int) -> None:
    options = Options(**CASES[case])
    for seed in range(10):
        random = np.random.default_rng(seed)
        logits = (3 * random.standard_normal(vocabulary)).astype(np.float32)
        seen = random.integers(0, vocabulary, 20)
        ids, probabilities = distribution(logits, options, seen)
        wanted = _theirs(logits, seen, options)
        assert set(ids) == set(np.flatnonzero(wanted)), "the same tokens are left"
        # their scores are float32: relative errors of an exponential are absolute ones of its argument
        np.testing.assert_allclose(probabilities, wanted[ids], rtol=1e-5)
        assert (np.diff(probabilities) <= 0).all()


@pytest.mark.parametrize("change", [{"top_k": 8}, {"top_p": 0.9}, {"min_p": 0.2}, {"repetition_penalty": 1.1}])
def test_another_option_is_another_distribution(change: dict[str, Any]) -> None:
    """What the comparison above would see."""
    random = np.random.default_rng(0)
    logits, seen = (3 * random.standard_normal(50)).astype(np.float32), random.integers(0, 50, 20)
    options = {"temperature": 1.0, "top_k": 40, "top_p": 0.99, "min_p": 0.001, "repetition_penalty": 1.4}
    wanted = _theirs(logits, seen, Options(**options))
    ids, probabilities = distribution(logits, Options(**{**options, **change}), seen)
    assert set(ids) != set(np.flatnonzero(wanted)) or not np.allclose(probabilities, wanted[ids], rtol=1e-5)


def test_a_tie_with_the_kth_stays_as_in_transformers() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    options = Options(temperature=1.0, top_k=2)
    ids, _ = distribution(logits, options)
    assert set(ids) == {1, 2, 3, 4} == set(np.flatnonzero(_theirs(logits, np.array([0]), options)))


def test_ids_beyond_the_head_are_not_penalised() -> None:
    logits = np.array([1, -1], np.float32)
    assert penalised(logits, np.array([0, 1, 7]), 2.0).tolist() == [0.5, -2.0]


def test_draws_have_the_probabilities_that_are_said() -> None:
    options = Options(temperature=1.0, top_k=5, seed=3)
    logits = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    sampler = Sampler(options, [1])
    drawn = np.bincount([sampler.pick(logits) for _ in range(20_000)], minlength=100)
    ids, probabilities = distribution(logits, options)
    assert drawn.sum() == drawn[ids].sum()
    # chi-square with 4 degrees of freedom: above 23.5 once in ten thousand seeds
    expected = 20_000 * probabilities
    assert ((drawn[ids] - expected) ** 2 / expected).sum() < 23.5


def test_greedy_takes_the_first_of_the_greatest_and_repeats_with_a_penalty_less() -> None:
    logits = np.array([0.0, 2.0, 2.0, 1.5], np.float32)
    plain = Sampler(Options(), [0])
    assert [plain.pick(logits) for _ in range(3)] == [1, 1, 1]
    # prompt and answer count
    penalty = Sampler(Options(repetition_penalty=2.0), [1])
    assert [penalty.pick(logits) for _ in range(3)] == [2, 3, 1]


def test_the_same_seed_draws_the_same_and_another_another() -> None:
    logits = np.random.default_rng(0).standard_normal((30, 500)).astype(np.float32)

    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Options(temperature=1.0, seed=seed), [1])
        return [sampler.pick(row) for row in logits]

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)
    assert drawn(None) != drawn(None)


def test_noise_of_float32_does_not_change_a_draw() -> None:
    """Two neighbours by probability may change places; the draw goes by id, so nothing else changes."""
    random = np.random.default_rng(1)
    logits = np.full((200, 1000), 1.0, np.float32)
    noisy = (logits + 1e-6 * random.standard_normal(logits.shape)).astype(np.float32)
    options = Options(temperature=1.0, seed=8)
    one, other = Sampler(options, [1]), Sampler(options, [1])
    same = sum(one.pick(a) == other.pick(b) for a, b in zip(logits, noisy, strict=True))
    assert same >= 198


def test_logits_that_are_no_numbers_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(RuntimeTargetError, match="not finite"):
            Sampler(Options(), [1]).pick(np.array([0.0, bad], np.float32))
    # labels that a head lacks are minus infinity, and that is fine
    assert Sampler(Options(), [1]).pick(np.array([0.0, -np.inf], np.float32)) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-30},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"max_new_tokens": 0},
        {"stop": ("",)},
        {"stop": ("x" * 257,)},
        {"stop": ("x",) * 17},
    ],
)
def test_wrong_options_say_what_to_pass(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"; pass "):
        Options(**wrong)
