"""The perplexity of a bundle and of the PyTorch model it was made from, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_bundle, open_slots
from deployfa.data import Row
from deployfa.edits import Array
from deployfa.errors import InputError
from deployfa.metrics import Perplexity, perplexity
from deployfa.parity.report import PerplexityParity
from deployfa.preprocess import PromptPreprocessor
from deployfa.preprocess.language import Piece, batches, pieces
from deployfa.preprocess.prompt import KEPT

__all__ = ["LIMIT", "bundle_perplexity", "compare_perplexity", "of_pieces"]

#: How far apart, relatively, the two may be.
LIMIT = 1e-3
#: Pieces are cut there, in tokens: what is compared is the same model on the same tokens, however they are cut.
LONGEST = 256
#: Tokens of a batch; the logits of a vocabulary are large.
_TOKENS = 512


def of_pieces(bundle: Bundle, rows: Sequence[Row]) -> list[Piece]:
    """``rows`` cut for the decoder in ``bundle``.  Raises ``DataError`` if there is nothing to judge it on."""
    settings = bundle.manifest.preprocessing
    ends = settings.generation.eos_token_ids if settings.generation is not None else []
    texts = [(row.text, row.completion) for row in rows]
    longest = min(settings.max_length, LONGEST)
    return pieces(bundle.path, texts, max_length=longest, end=ends[0] if ends else None)


def bundle_perplexity(
    bundle: Bundle, found: Sequence[Piece], *, rows: int, target: str | None = None, engine: str | None = None
) -> Perplexity:
    """Of ``bundle`` as it is deployed, the adapter it was exported with active.  Raises ``InputError`` for a pack."""
    if bundle.manifest.tables is not None:
        raise InputError(f"'{bundle.path}' is a pack; the perplexity of each adapter is that of its own bundle")
    run: Callable[[Mapping[str, Array]], dict[str, Array]]
    if bundle.manifest.slots is not None:
        run = open_slots(bundle, target=target, engine=engine, spinning=False).run
    else:
        run = open_bundle(bundle, target or bundle.manifest.target, engine=engine, spinning=False).run
    names = {tensor.name for tensor in bundle.manifest.graph.inputs}
    reader = PromptPreprocessor(bundle.path, bundle.manifest.preprocessing)
    return perplexity(np.concatenate(list(_likelihoods(run, names, reader, found))), rows=rows)


def compare_perplexity(
    bundle: Bundle,
    rows: Sequence[Row],
    truth: Callable[[Sequence[Piece]], Array],
    *,
    target: str | None = None,
    engine: str | None = None,
) -> PerplexityParity:
    """``truth``: pieces → the log-likelihood of each token that is learnt, by PyTorch."""
    found = of_pieces(bundle, rows)
    deployed = bundle_perplexity(bundle, found, rows=len(rows), target=target, engine=engine)
    wanted = perplexity(truth(found), rows=len(rows))
    difference = None
    if deployed.perplexity is not None and wanted.perplexity is not None:
        difference = deployed.perplexity / wanted.perplexity - 1.0
    return PerplexityParity(
        tokens=wanted.tokens,
        truth=wanted.perplexity,
        deployed=deployed.perplexity,
        difference=difference,
        limit=LIMIT,
    )


def _likelihoods(
    run: Callable[[Mapping[str, Array]], dict[str, Array]],
    names: set[str],
    reader: PromptPreprocessor,
    found: Sequence[Piece],
) -> Iterator[Array]:
    for batch in batches(found, _TOKENS):
        feeds = reader.feeds([piece.tokens for piece in batch])
        width = feeds["input_ids"].shape[1]
        feeds[KEPT] = np.arange(width - 1)
        logits = run({name: array for name, array in feeds.items() if name in names})["logits"]
        logits -= logits.max(-1, keepdims=True)
        picked = np.take_along_axis(logits, feeds["input_ids"][:, 1:, None], axis=2)[..., 0]
        scores = picked - np.log(np.exp(logits).sum(-1))
        for row, piece in zip(scores, batch, strict=True):
            yield row[width - 1 - piece.learnt :]
