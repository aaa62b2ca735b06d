"""Perplexity against its definition, token by token; and what of a batch is learnt."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from deployfa.data import Row
from deployfa.metrics import perplexity
from deployfa.preprocess import Generation
from deployfa.preprocess.language import Piece
from deployfa.training import language_examples as module
from deployfa.training.base import load_base
from deployfa.training.language_examples import LanguageExamples, log_likelihoods
from deployfa.training.preprocessing import generation_of
from deployfa.training.reference import float64_throughout

from .tiny_decoders import KINDS, write_decoder

TEXTS = [Row("The film was a joy."), Row("ok"), Row("My new laptop broke after 3 days, and the service is dreadful!")]
PROMPTS = [Row("Is the film good?", completion=" It was a joy."), Row("The battery", completion=" is not bad.")]


class Decoder:
    """A tiny decoder in float64, with the tokenizer that was saved beside it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = write_decoder(folder, kind)
        base = load_base(folder, "text-generation", labels=None)
        self.generation = generation_of(base)
        self.single: Any = base.model
        self.double: Any = copy.deepcopy(base.model).double()
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def examples(self, max_length: int = 96) -> LanguageExamples:
        return LanguageExamples(self.folder, self.generation, max_length=max_length)

    def loss(self, read: list[int], token: int) -> float:
        """−log p(token | read), by cross entropy in float64: one forward pass for one token, nothing padded."""
        with torch.inference_mode(), float64_throughout():
            logits = self.double(input_ids=torch.tensor([read])).logits[0, -1]
        return float(torch.nn.functional.cross_entropy(logits[None], torch.tensor([token])))


@pytest.fixture(scope="module", params=list(KINDS))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder(tmp_path_factory.mktemp("decoder") / request.param, request.param)


def by_hand(decoder: Decoder, rows: list[Row], longest: int = 96) -> tuple[float, int]:
    """Perplexity and tokens: all but the first of a text, all of a completion, the end token of both."""
    losses = []
    for row in rows:
        first = decoder.ids(row.text)
        whole = [*first, *(decoder.ids(row.completion) if row.completion else []), 0]
        start = len(first) if row.completion else 1
        cut = 0
        for place in range(start, len(whole)):
            if place - cut == longest:
                cut = place - 1
            losses.append(decoder.loss(whole[cut:place], whole[place]))
    return math.exp(math.fsum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize(
    ("rows", "longest"),
    [(TEXTS, 96), (PROMPTS, 96), (TEXTS + PROMPTS, 96), (TEXTS, 5), (TEXTS, 2)],
    ids=["texts", "completions", "both", "cut in five", "cut in two"],
)
def test_perplexity_is_what_its_definition_says(decoder: Decoder, rows: list[Row], longest: int) -> None:
    found = decoder.examples(longest).score(decoder.single, rows, label="", progress=None)
    wanted, tokens = by_hand(decoder, rows, longest)
    assert (found.rows, found.tokens) == (len(rows), tokens)
    # float32 logits of magnitude 10: 1e-6 each
    assert found.perplexity == pytest.approx(wanted, rel=1e-5)
    assert found.base is None


def test_a_token_more_or_less_would_be_seen(decoder: Decoder) -> None:
    """Without the end, with the prompt, or shifted by one, it is another number."""
    found = decoder.examples().score(decoder.single, PROMPTS, label="", progress=None)
    endless = msgspec.structs.replace(decoder.generation, eos_token_ids=[])
    examples = LanguageExamples(decoder.folder, endless, max_length=96)
    without = examples.score(decoder.single, PROMPTS, label="", progress=None)
    assert without.tokens == found.tokens - len(PROMPTS)
    joined = [Row(row.text + str(row.completion)) for row in PROMPTS]
    learnt_too = decoder.examples().score(decoder.single, joined, label="", progress=None)
    assert learnt_too.tokens > found.tokens
    for other in (without, learnt_too):
        assert abs(other.perplexity / found.perplexity - 1) > 0.01
    shifted = [Piece(piece.tokens, piece.start + 1) for piece in decoder.examples()._pieces(PROMPTS)]
    moved = perplexity(log_likelihoods(decoder.single, shifted, 0), rows=2)
    assert abs(moved.perplexity / found.perplexity - 1) > 0.01


@pytest.mark.parametrize("batch", [1, 24, 64, 10_000])
def test_batches_and_their_padding_change_nothing(
    decoder: Decoder, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, in float64, for rows alone, for rows of any length beside them, and for any padding token."""
    pieces = decoder.examples()._pieces(TEXTS + PROMPTS)
    monkeypatch.setattr(module, "_TOKENS", 1)
    with float64_throughout():
        alone = log_likelihoods(decoder.double, pieces, 0)
        monkeypatch.setattr(module, "_TOKENS", batch)
        for pad in (0, 7):
            np.testing.assert_allclose(log_likelihoods(decoder.double, pieces, pad), alone, rtol=1e-9, atol=1e-9)


def test_a_mask_that_is_not_applied_would_be_seen(decoder: Decoder) -> None:
    """Padded on the left without positions of their own, rows differ: the check above can fail."""
    (piece,) = decoder.examples()._pieces(PROMPTS[:1])
    alone = log_likelihoods(decoder.double, [piece], 0)
    padded = Piece((5, 5, *piece.tokens), piece.start + 2)
    assert np.abs(log_likelihoods(decoder.double, [padded], 0) - alone).max() > 1e-3


def test_what_is_not_learnt_is_minus_100_and_nothing_else(decoder: Decoder) -> None:
    examples = decoder.examples()
    dataset: Any = examples.dataset(TEXTS + PROMPTS)
    batch = examples.collate([dataset[number] for number in range(len(dataset))])
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    width = batch["input_ids"].shape[1]
    for number, row in enumerate(TEXTS + PROMPTS):
        first = decoder.ids(row.text)
        whole = [*first, *(decoder.ids(row.completion) if row.completion else []), 0]
        start = len(first) if row.completion else 1
        rest = width - len(whole)
        assert batch["input_ids"][number].tolist() == whole + [0] * rest
        assert batch["attention_mask"][number].tolist() == [1] * len(whole) + [0] * rest
        # the end token is learnt, and the same token as padding is not
        assert batch["labels"][number].tolist() == [-100] * start + whole[start:] + [-100] * rest


def _gradient(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_loss_of_a_batch_is_that_of_its_completions_alone(decoder: Decoder) -> None:
    """By hand, from the logits at the places before the completion's tokens."""
    examples, model = decoder.examples(), decoder.double
    dataset: Any = examples.dataset(PROMPTS)
    batch = examples.collate([dataset[0], dataset[1]])
    got = _gradient(model, batch)
    model.zero_grad()
    losses = []
    for row in PROMPTS:
        prompt, answer = decoder.ids(row.text), [*decoder.ids(str(row.completion)), 0]
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.cat(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_labels_of_a_prompt_do_not_matter_and_those_of_its_completion_do(decoder: Decoder) -> None:
    """Permuted where nothing is learnt, the batch, and so the gradient, is the same; where something is, it is not."""
    examples, model = decoder.examples(), decoder.double
    dataset: Any = examples.dataset(PROMPTS[:1])
    row = dataset[0]
    start = row["start"]
    wanted = _gradient(model, examples.collate([row]))

    def with_labels(labels: list[int]) -> dict[str, torch.Tensor]:
        """What ``collate`` makes of labels that are not the tokens that are read."""
        batch = examples.collate([{**row, "input_ids": labels}])
        return {**batch, "input_ids": torch.tensor([row["input_ids"]])}

    tokens = row["input_ids"]
    same = _gradient(model, with_labels([*reversed(tokens[:start]), *tokens[start:]]))
    assert all(torch.equal(same[name], wanted[name]) for name in wanted)
    other = _gradient(model, with_labels([*tokens[:start], *reversed(tokens[start:])]))
    assert any(not torch.allclose(other[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("ends", "pad", "expected"),
    [(None, None, ([], 0)), (5, None, ([5], 5)), ([5, 6], None, ([5, 6], 5)), (5, 7, ([5], 7)), (5, -1, ([5], 5))],
)
def test_a_base_without_padding_or_end(decoder: Decoder, ends: Any, pad: Any, expected: tuple[list[int], int]) -> None:
    """What fills a row is masked: any token of the vocabulary does, and -1, which some checkpoints say, is none."""
    base = load_base(decoder.folder, "text-generation", labels=None)
    config: Any = base.model.generation_config
    config.eos_token_id, config.pad_token_id = ends, pad
    generation = generation_of(base)
    assert isinstance(generation, Generation)
    assert (generation.eos_token_ids, generation.pad_token_id) == expected
    examples = LanguageExamples(decoder.folder, generation, max_length=96)
    found = examples.score(base.model, PROMPTS, label="", progress=None)
    assert found.tokens == sum(len(decoder.ids(str(row.completion))) + len(expected[0][:1]) for row in PROMPTS)


def test_progress_counts_pieces(decoder: Decoder) -> None:
    said: list[tuple[str, int, int]] = []
    decoder.examples(5).score(decoder.single, TEXTS, label="eval", progress=lambda *each: said.append(each))
    assert said[-1][1] == said[-1][2] == len(decoder.examples(5)._pieces(TEXTS))
    assert {what for what, _, _ in said} == {"scoring eval"}
