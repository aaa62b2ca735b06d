"""The truth of a mixed batch: every row from its own adapter, unfolded, in float64, and then shuffled together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Array
from deployfa.graph.resize import resize_heads
from deployfa.parity.cases import Case, text_cases, widened
from deployfa.parity.truth import Noise, graph_truth
from deployfa.preprocess import TextPreprocessor

__all__ = ["mixed_truth"]

#: No adapter is judged on fewer rows.
_FEWEST = 4


def mixed_truth(
    base: ir.Model,
    adapters: Mapping[int, Callable[[], Adapter]],
    preprocessor: TextPreprocessor,
    texts: Sequence[str],
    *,
    labels: int,
    seed: int = 0,
    silent: Callable[[int, Adapter, Sequence[Case], Noise], None] | None = None,
    status: Callable[[str], None] | None = None,
) -> tuple[list[Case], Noise]:
    """Cases whose rows run different adapters, with their truth, and the noise of all of them together.

    adapters: row of the table → the adapter, called once.  texts are dealt out among them, at least four to each, and
    used again where they run out.  labels: the width of the answers; where an adapter has fewer, the truth is minus
    infinity.  ``silent`` is called with each adapter's own cases and noise.
    """
    say = status or (lambda _: None)
    dealt: list[tuple[int, str, Array, Array]] = []
    squares = np.zeros(2)
    largest = 0.0
    each = max(_FEWEST, -(-len(texts) // len(adapters)))
    for number, (row, load) in enumerate(adapters.items()):
        say(f"computing the reference in float64: adapter {number + 1} of {len(adapters)}")
        adapter = load()
        mine = [texts[(number * each + i) % len(texts)] for i in range(each)]
        cases, noise = graph_truth(resize_heads(base, adapter), adapter, [Case(preprocessor.encode(mine))])
        if silent is not None:
            silent(row, adapter, cases, noise)
        truth = cases[0].truth
        assert truth is not None  # graph_truth computes it, and the base's answers
        squares += noise.relative**2 * np.sum(truth**2), np.sum(truth**2)
        largest = max(largest, noise.max_abs)
        wide = widened(cases[0], labels)
        assert wide.truth is not None and wide.base is not None  # as above
        dealt += [(row, text, t, b) for text, t, b in zip(mine, wide.truth, wide.base, strict=True)]
    order = np.random.default_rng(seed).permutation(len(dealt))
    shuffled = [dealt[i] for i in order]
    mixed: list[Case] = []
    for case in text_cases(preprocessor, [text for _, text, _, _ in shuffled]):
        # a case that repeats rows at another shape names none: the first of that text is as good
        rows = case.rows if case.rows is not None else _rows_of(case, mixed)
        if rows is None:
            continue
        chosen = [shuffled[i] for i in rows]
        feeds = {**case.feeds, "adapter_ids": np.array([row for row, *_ in chosen], np.int64)}
        mixed.append(
            Case(feeds, np.stack([t for _, _, t, _ in chosen]), np.stack([b for *_, b in chosen]), rows=case.rows)
        )
    return mixed, Noise(float(np.sqrt(squares[0] / squares[1])), largest, ())


def _rows_of(case: Case, mixed: Sequence[Case]) -> list[int] | None:
    """The rows whose tokens are those of ``case``, padding aside; ``None`` if one is in no case before."""
    known = {
        ids[mask.astype(bool)].tobytes(): row
        for other in mixed
        if other.rows is not None
        for ids, mask, row in zip(other.feeds["input_ids"], other.feeds["attention_mask"], other.rows, strict=True)
    }
    found = [
        known.get(ids[mask.astype(bool)].tobytes())
        for ids, mask in zip(case.feeds["input_ids"], case.feeds["attention_mask"], strict=True)
    ]
    return [row for row in found if row is not None] if None not in found else None
