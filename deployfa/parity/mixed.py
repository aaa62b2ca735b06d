"""The truth of a mixed batch: every row from its own adapter, unfolded, in float64, and then shuffled together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Array
from deployfa.graph.resize import resize_heads
from deployfa.parity.cases import Case, make_cases, widened
from deployfa.parity.decoding import with_decoding
from deployfa.parity.noise import MOST_RUNS, Noise
from deployfa.parity.truth import graph_truth
from deployfa.preprocess import Preprocessor, PromptPreprocessor
from deployfa.preprocess.prompt import KEPT

__all__ = ["mixed_truth"]

#: No adapter is judged on fewer rows.
_FEWEST = 4


def mixed_truth(
    base: ir.Model,
    adapters: Mapping[int, Callable[[], Adapter]],
    preprocessor: Preprocessor,
    items: Sequence[Any],
    *,
    labels: int,
    seed: int = 0,
    silent: Callable[[int, Adapter, Sequence[Case], Noise], None] | None = None,
    status: Callable[[str], None] | None = None,
) -> tuple[list[Case], Noise]:
    """Cases whose rows run different adapters, with their truth, and the noise of all of them together.

    adapters: row of the table → the adapter, called once.  Items are dealt out among them, at least four to each, and
    used again where they run out.  labels: the width of the answers; where an adapter has fewer, the truth is minus
    infinity.  ``silent`` is called with each adapter's own cases and noise.
    """
    say = status or (lambda _: None)
    dealt: list[tuple[int, Any, Array, Array]] = []
    squares = np.zeros(2)
    largest = 0.0
    # caches of several adapters fit into one batch if what was read is equally long
    width = max(preprocessor.lengths(items)) if isinstance(preprocessor, PromptPreprocessor) else None
    later: list[list[tuple[int, Case]]] = []
    each = max(_FEWEST, -(-len(items) // len(adapters)))
    # of all adapters together; of each the model as it is, and another one
    runs = max(2, -(-MOST_RUNS // len(adapters)))
    for number, (row, load) in enumerate(adapters.items()):
        say(f"computing the reference in float64: adapter {number + 1} of {len(adapters)}")
        adapter = load()
        mine = [items[(number * each + i) % len(items)] for i in range(each)]
        own = [Case(preprocessor.encode(mine, length=width), rows=tuple(range(each)), items=tuple(range(each)))]
        if isinstance(preprocessor, PromptPreprocessor):
            own = with_decoding(preprocessor, base, own)
        cases, noise = graph_truth(resize_heads(base, adapter), adapter, own, runs=runs, seed=number * MOST_RUNS)
        if silent is not None:
            silent(row, adapter, cases, noise)
        square = sum(float(np.sum(case.truth**2)) for case in cases if case.truth is not None)
        squares += noise.relative**2 * square, square
        later.append([(row, widened(case, labels)) for case in cases[1:]])
        largest = max(largest, noise.max_abs)
        wide = widened(cases[0], labels)
        assert wide.truth is not None and wide.base is not None  # as above
        dealt += [(row, item, t, b) for item, t, b in zip(mine, wide.truth, wide.base, strict=True)]
    random = np.random.default_rng(seed)
    order = random.permutation(len(dealt))
    shuffled = [dealt[i] for i in order]
    mixed: list[Case] = []
    for case in make_cases(preprocessor, [item for _, item, _, _ in shuffled]):
        chosen = [shuffled[i] for i in case.items]
        feeds = {**case.feeds, "adapter_ids": np.array([row for row, *_ in chosen], np.int64)}
        mixed.append(
            dataclasses.replace(
                case, feeds=feeds, truth=np.stack([t for _, _, t, _ in chosen]), base=np.stack([b for *_, b in chosen])
            )
        )
    mixed += [_together(cases, random) for cases in zip(*later, strict=True)]
    return mixed, Noise(float(np.sqrt(squares[0] / squares[1])), largest, ())


def _together(cases: Sequence[tuple[int, Case]], random: np.random.Generator) -> Case:
    """Cases of a decoder that goes on, each of another adapter's rows, as one whose rows are shuffled."""
    ids = np.repeat([row for row, _ in cases], [case.size for _, case in cases])
    order = random.permutation(len(ids))
    first = cases[0][1]
    feeds = {
        name: array if name == KEPT else np.concatenate([case.feeds[name] for _, case in cases])[order]
        for name, array in first.feeds.items()
    }
    truth, base = (
        np.concatenate([answer for _, case in cases if (answer := getattr(case, name)) is not None])[order]
        for name in ("truth", "base")
    )
    return Case({**feeds, "adapter_ids": ids[order].astype(np.int64)}, truth, base)
