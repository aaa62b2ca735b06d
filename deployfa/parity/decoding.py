"""Cases of a decoder that goes on: the cache of what it has read, and tokens that are new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.graph.evaluate import evaluate
from deployfa.parity.cases import Case
from deployfa.preprocess import PromptPreprocessor
from deployfa.preprocess.prompt import KEPT, cache_names

__all__ = ["with_decoding"]

#: How many tokens are new: the one that ``generate`` adds, and several, as when a person answers.
_NEW = (1, 3)
_ROWS = 4


def with_decoding(preprocessor: PromptPreprocessor, graph: ir.Model, cases: Sequence[Case]) -> list[Case]:
    """``cases`` and, of the longest rows among them, such with a cache: the base's own, in float32, of what is before.

    The cache of another model would be as good a feed; this one has numbers of the right size.
    """
    longest = max((case for case in cases if case.rows is not None), key=lambda case: int(case.feeds[KEPT][0]))
    mask = longest.feeds["attention_mask"]
    chosen = np.argsort(-mask.sum(axis=1), kind="stable")[:_ROWS]
    # nothing is computed for a row that is all padding so far
    chosen = chosen[mask[chosen, : -max(_NEW)].sum(axis=1) > 0]
    if not len(chosen):
        return list(cases)
    items = tuple(longest.items[i] for i in chosen)
    found = list(cases)
    for new in _NEW:
        before = _slice(longest.feeds, chosen, slice(None, -new))
        before |= {name: longest.feeds[name][chosen] for name, _ in cache_names(preprocessor.cache)}
        (answers,) = evaluate(graph, [{**before, KEPT: np.array([0], np.int64)}], dtype="float32")
        feeds = _slice(longest.feeds, chosen, slice(-new, None)) | {"attention_mask": mask[chosen]}
        feeds |= {past: answers[present] for past, present in cache_names(preprocessor.cache)}
        found.append(Case({**feeds, KEPT: np.array([new - 1], np.int64)}, items=items))
    return found


def _slice(feeds: Mapping[str, Array], rows: Array, tokens: slice) -> dict[str, Array]:
    return {name: feeds[name][rows][:, tokens] for name in ("input_ids", "attention_mask", "position_ids")}
