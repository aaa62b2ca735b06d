"""Answer raw text with a bundle: tokenizers and a runtime, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.errors import BundleError, InputError
from deployfa.graph.row_ops import ADAPTER_IDS, STRENGTH
from deployfa.preprocess import TextPreprocessor
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

__all__ = ["Answer", "Predictor", "RunReport"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The label of one text; ``score`` is its softmax probability in [0, 1], ``scores`` that of every label.

    ``adapter``: whose answer it is, in a pack.
    """

    text: str
    adapter: str | None = None
    label: str
    score: float
    scores: dict[str, float]


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``run --json``."""

    bundle: str
    patch: str | None = None
    answers: list[Answer]


class Predictor:
    """A session and a tokenizer, made once, asked often."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        manifest = bundle.manifest
        if manifest.preprocessing.kind != "text":
            raise BundleError(f"'{bundle.path}' reads {manifest.preprocessing.kind}, not text")
        self._preprocessor = TextPreprocessor(bundle.path, max_length=manifest.preprocessing.max_length)
        self._runner = OnnxRuntimeRunner(
            bundle.graph, threads=threads, initializers=bundle.initializers, bound=bundle.bound
        )
        self._names = [spec.name for spec in self._runner.inputs]
        self._output = self._runner.outputs[0].name
        self._labels = bundle.labels
        tables = manifest.tables
        self._members = {} if tables is None else {m.name: (row, m) for row, m in enumerate(tables.adapters)}

    @property
    def adapters(self) -> list[str]:
        """The names of a pack's adapters, the base's first; empty for any other bundle."""
        return list(self._members)

    def answer(
        self,
        texts: Sequence[str],
        *,
        adapters: Sequence[str] | None = None,
        strength: float | None = None,
        batch_size: int = 32,
    ) -> Iterator[Answer]:
        """Answers in the order of ``texts``, once all are there: rows are batched by length, whatever their adapters.

        adapters: of a pack, one for each text; strength: how much of them, 0 the base's features, 1 all.  An answer has
        its own adapter's labels only.
        """
        logits = self.logits(texts, adapters=adapters, strength=strength, batch_size=batch_size)
        for number, text in enumerate(texts):
            adapter = adapters[number] if adapters is not None else None
            row = logits[number][~np.isneginf(logits[number])]
            labels = self._labels if adapter is None else list(self._members[adapter][1].labels)
            labels = labels or [f"LABEL_{position}" for position in range(len(row))]
            if len(labels) != len(row):
                raise BundleError(f"the bundle names {len(labels)} labels for {len(row)} outputs; export it again")
            shifted = np.exp(row - row.max())
            scores = {label: float(p) for label, p in zip(labels, shifted / shifted.sum(), strict=True)}
            best = labels[int(row.argmax())]
            yield Answer(text=text, adapter=adapter, label=best, score=scores[best], scores=scores)

    def logits(
        self,
        texts: Sequence[str],
        *,
        adapters: Sequence[str] | None = None,
        strength: float | None = None,
        batch_size: int = 32,
    ) -> Array:
        """(len(texts), labels), float32; minus infinity where a pack's adapter has fewer labels than another."""
        rows = self._rows(texts, adapters)
        if strength is not None and not (self._members and 0.0 <= strength <= 1.0):
            raise InputError(f"strength {strength} is for a pack and between 0, the base, and 1, the adapter")
        order = np.argsort(self._preprocessor.lengths(texts), kind="stable")
        found: list[Array | None] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            feeds = self._preprocessor.encode([texts[i] for i in chosen])
            if rows is not None:
                feeds[ADAPTER_IDS] = rows[chosen]
            wanted = {name: feeds[name] for name in self._names}
            if strength is not None:
                wanted[STRENGTH] = np.full(1, strength, np.float32)
            outputs = self._runner.run(wanted)[self._output]
            for position, row in zip(chosen, outputs, strict=True):
                found[int(position)] = row
        return np.stack([row for row in found if row is not None])

    def _rows(self, texts: Sequence[str], adapters: Sequence[str] | None) -> Array | None:
        """The row of the table for every text; ``None`` for a bundle without one."""
        if not self._members:
            if adapters is not None:
                raise InputError("the bundle holds one adapter; leave --adapter out, or make a pack: deployfa pack")
            return None
        if adapters is None:
            raise InputError(f"name the adapter that answers with --adapter; in this pack: {_listed(self.adapters)}")
        if len(adapters) != len(texts):
            raise InputError(f"{len(adapters)} adapters for {len(texts)} texts; name one for all, or one for each")
        for name in adapters:
            if name not in self._members:
                near = difflib.get_close_matches(name, self.adapters, n=4) or self.adapters
                raise InputError(f"no adapter '{name}' in this pack; there are: {_listed(near)}")
        return np.array([self._members[name][0] for name in adapters], np.int64)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
