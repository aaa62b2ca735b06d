"""Whether a bundle generates what PyTorch does: the most likely tokens, one after the other, and where they part.

Two float32 runtimes add in different orders, so two tokens that are equally likely but for noise may be taken one here
and the other there, and from then on the two read different texts.  What can be judged is the first difference: how far
apart the two candidates are, and whether noise can close that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.errors import InputError, MissingExtraError
from deployfa.generation.batch import Batch
from deployfa.generation.generator import Generator, Request, open_generator
from deployfa.generation.options import Options
from deployfa.parity.measures import LIMIT
from deployfa.parity.report import GreedyComparison, GreedyReport, ParityReport
from deployfa.preprocess.sentences import SENTENCES
from deployfa.runtimes.slots import Current, SlotAdapter

if TYPE_CHECKING:
    import torch

__all__ = ["PROMPTS", "compare_greedy", "torch_greedy", "verify_greedy", "with_greedy"]

#: Beginnings of built-in sentences.
PROMPTS = [sentence[: len(sentence) // 2].rstrip() for sentence in SENTENCES[:20]]


def compare_greedy(
    generator: Generator,
    model: torch.nn.Module,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    noise_max_abs: float,
    adapter: str | None = None,
    strength: float | None = None,
    slot: SlotAdapter | Current | None = "current",
) -> GreedyReport:
    """Generate greedily with ``generator``, all prompts together, and with ``model``, a causal language model of
    transformers, each prompt alone.

    adapter, strength, slot: of the bundle, see ``Request`` and ``Generator.stream``; ``model`` must have the same one.
    """
    options = Options(max_new_tokens=max_new_tokens)
    asked = [Request(prompt=prompt, options=options, adapter=adapter, strength=strength) for prompt in prompts]
    found = []
    for request, completion in zip(asked, generator.generate(asked, slot=slot), strict=True):
        prompt = generator.tokenizer.encode(str(request.prompt))
        theirs = torch_greedy(model, prompt, max_new_tokens, generator.settings.eos_token_ids)
        found.append(_compared(generator, model, request, prompt, completion.token_ids, theirs, slot, noise_max_abs))
    return GreedyReport(
        prompts=len(found),
        equal=sum(each.equal for each in found),
        max_new_tokens=max_new_tokens,
        noise_max_abs=noise_max_abs,
        limit=LIMIT,
        passed=all(each.explained for each in found),
        comparisons=found,
    )


def verify_greedy(
    bundle: Bundle,
    *,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    model: str | None = None,
    target: str | None = None,
    threads: int | None = None,
) -> GreedyReport:
    """``compare_greedy`` of a bundle with one adapter, or with slots, its own adapter in them, against PyTorch with the
    adapter unfolded.  prompts: beginnings of built-in sentences by default; model: the base, by default the one that
    the bundle names.

    Raises ``InputError`` for a pack, whose adapters are not in the bundle, and for a patch; ``MissingExtraError``
    without torch.
    """
    if bundle.manifest.tables is not None or bundle.patch is not None:
        raise InputError("PyTorch can generate only what a bundle holds the adapter of; pass the adapter's own bundle")
    try:
        from deployfa.training.reference import adapted_model
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train", "generating in PyTorch") from error
    generator = open_generator(bundle, target=target, threads=threads)
    beginnings = prompts or PROMPTS
    return compare_greedy(
        generator,
        adapted_model(bundle.adapter, model or bundle.manifest.base.name),
        beginnings,
        max_new_tokens=max_new_tokens,
        noise_max_abs=bundle.manifest.reference.noise_max_abs,
    )


def with_greedy(report: ParityReport, found: GreedyReport) -> ParityReport:
    """``report`` with ``found`` in it and in its verdict."""
    if found.passed or not report.passed:
        return msgspec.structs.replace(report, greedy=found)
    first = next(each for each in found.comparisons if not each.explained)
    reason = f"'{first.prompt}' goes on otherwise than in PyTorch from token {first.tokens + 1} on, which is not noise"
    return msgspec.structs.replace(report, greedy=found, passed=False, reason=reason)


def torch_greedy(model: Any, prompt: Sequence[int], most: int, ends: Sequence[int]) -> list[int]:
    """Tokens that ``generate(do_sample=False)`` goes on with, a token of ``ends`` among them."""
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            # a checkpoint may bring others
            repetition_penalty=1.0,
            eos_token_id=list(ends) or None,
            pad_token_id=0,
        )
    return [int(token) for token in found[0, ids.shape[1] :]]


def _compared(
    generator: Generator,
    model: Any,
    request: Request,
    prompt: list[int],
    ours: list[int],
    theirs: list[int],
    slot: SlotAdapter | Current | None,
    noise_max_abs: float,
) -> GreedyComparison:
    shown = str(request.prompt)
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if same == len(ours) == len(theirs):
        return GreedyComparison(prompt=shown, tokens=same)
    mine = ours[same] if same < len(ours) else None
    other = theirs[same] if same < len(theirs) else None
    if mine is None or other is None:
        # one went on after the same tokens: a question of when to stop, which noise does not answer
        return GreedyComparison(prompt=shown, tokens=same, position=same, ours=mine, theirs=other, explained=False)
    before = [*prompt, *theirs[:same]]
    our_logits, their_logits = _next_logits(generator, request, before, slot), _torch_logits(model, before)
    our_gap = float(our_logits[mine] - our_logits[other])
    their_gap = float(their_logits[other] - their_logits[mine])
    # both gaps together are what four logits are off, each by as much as a runtime may be
    explained = our_gap + their_gap <= 4 * LIMIT * noise_max_abs
    return GreedyComparison(
        prompt=shown,
        tokens=same,
        position=same,
        ours=mine,
        theirs=other,
        our_gap=our_gap,
        their_gap=their_gap,
        explained=explained,
    )


def _next_logits(generator: Generator, request: Request, ids: list[int], slot: SlotAdapter | Current | None) -> Array:
    """(vocabulary,) after ``ids``, in the bundle."""
    decoder = generator.decoder
    with decoder.adapted([request.adapter], [request.strength], slot=slot) as run:
        logits: Array = Batch(decoder, run, [ids], requests=[0]).prefill()[0].astype(np.float64)
    return logits


def _torch_logits(model: Any, ids: list[int]) -> Array:
    """(vocabulary,) after ``ids``, in PyTorch."""
    import torch

    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0, -1].double().numpy())
