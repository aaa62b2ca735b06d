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
from deployfa.parity.truth import Noise, graph_truth
from deployfa.preprocess import Preprocessor

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
    each = max(_FEWEST, -(-len(items) // len(adapters)))
    for number, (row, load) in enumerate(adapters.items()):
        say(f"computing the reference in float64: adapter {number + 1} of {len(adapters)}")
        adapter = load()
        mine = [items[(number * each + i) % len(items)] for i in range(each)]
        cases, noise = graph_truth(resize_heads(base, adapter), adapter, [Case(preprocessor.encode(mine))])
        if silent is not None:
            silent(row, adapter, cases, noise)
        truth = cases[0].truth
        assert truth is not None  # graph_truth computes it, and the base's answers
        squares += noise.relative**2 * np.sum(truth**2), np.sum(truth**2)
        largest = max(largest, noise.max_abs)
        wide = widened(cases[0], labels)
        assert wide.truth is not None and wide.base is not None  # as above
        dealt += [(row, item, t, b) for item, t, b in zip(mine, wide.truth, wide.base, strict=True)]
    order = np.random.default_rng(seed).permutation(len(dealt))
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
    return mixed, Noise(float(np.sqrt(squares[0] / squares[1])), largest, ())
