"""The server's answers are those of the bundle itself, whatever rides in the same batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deployfa.bundle import Bundle
from deployfa.predict import Predictor

TEXTS = [
    "A joy from start to finish.",
    "I want my money back.",
    "The plot is thin, but the cast is charming, and by the end I did not mind that nothing had happened at all.",
    "No.",
]


@pytest.mark.parametrize("model", ["pack", "baked"])
def test_a_pack_answers_as_run_does(served, packs: dict[str, Path], model: str) -> None:
    predictor = Predictor(Bundle.open(packs[model]))
    wanted = [(text, adapter) for text in TEXTS for adapter in ("vefa", "lorfa", "base")]
    own = predictor.logits([text for text, _ in wanted], adapters=[adapter for _, adapter in wanted])
    with ThreadPoolExecutor(len(wanted)) as threads:
        answers = list(threads.map(lambda each: served.answer(model, each[0], adapter=each[1]), wanted))
    for (_, adapter), logits, answer in zip(wanted, own, answers, strict=True):
        logits = logits[np.isfinite(logits)]
        assert np.allclose(answer["logits"], logits, rtol=0, atol=1e-5), adapter
        shifted = np.exp(logits - logits.max())
        assert answer["score"][0] == pytest.approx(1 / shifted.sum(), abs=1e-5)


def test_two_adapters_do_answer_differently(served) -> None:
    """Or the test above would pass for a server that ignores the parameter."""
    answers = [served.answer("pack", TEXTS[0], adapter=name)["logits"] for name in ("vefa", "lorfa", "base")]
    assert all(abs(a[0] - b[0]) > 1e-3 for i, a in enumerate(answers) for b in answers[:i])


def test_half_the_strength_is_between(served) -> None:
    half, none = (served.answer("pack", TEXTS[0], adapter="vefa", strength=s)["logits"] for s in (0.5, 0))
    whole = served.answer("pack", TEXTS[0], adapter="vefa", strength=1)["logits"]
    assert abs(half[0] - none[0]) > 1e-3 and abs(half[0] - whole[0]) > 1e-3


def test_folded_and_slots_answer_as_their_adapter(served, bundles: dict[str, Path]) -> None:
    own = Predictor(Bundle.open(bundles["folded"])).logits(TEXTS)
    for text, logits in zip(TEXTS, own, strict=True):
        assert np.allclose(served.answer("folded", text)["logits"], logits, atol=1e-5)
        assert np.allclose(served.answer("slots", text)["logits"], logits, atol=1e-5)
