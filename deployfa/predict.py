"""Answer raw text with a bundle: tokenizers and a runtime, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.errors import BundleError
from deployfa.preprocess import TextPreprocessor
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

__all__ = ["Answer", "Predictor", "RunReport"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The label of one text; ``score`` is its softmax probability in [0, 1], ``scores`` that of every label."""

    text: str
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
        self._runner = OnnxRuntimeRunner(bundle.graph, threads=threads, initializers=bundle.initializers)
        self._names = [spec.name for spec in self._runner.inputs]
        self._output = self._runner.outputs[0].name
        self._labels = bundle.labels

    def answer(self, texts: Sequence[str], *, batch_size: int = 32) -> Iterator[Answer]:
        """Answers in the order of ``texts``, once all are there: rows are batched by length."""
        logits = self.logits(texts, batch_size=batch_size)
        labels = self._labels or [f"LABEL_{number}" for number in range(logits.shape[-1])]
        if len(labels) != logits.shape[-1]:
            raise BundleError(f"the bundle names {len(labels)} labels for {logits.shape[-1]} outputs; export it again")
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        for text, row in zip(texts, shifted / shifted.sum(-1, keepdims=True), strict=True):
            scores = {label: float(p) for label, p in zip(labels, row, strict=True)}
            best = labels[int(row.argmax())]
            yield Answer(text=text, label=best, score=scores[best], scores=scores)

    def logits(self, texts: Sequence[str], *, batch_size: int = 32) -> Array:
        """(len(texts), labels), float32."""
        order = np.argsort(self._preprocessor.lengths(texts), kind="stable")
        found: list[Array | None] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            feeds = self._preprocessor.encode([texts[i] for i in chosen])
            outputs = self._runner.run({name: feeds[name] for name in self._names})[self._output]
            for position, row in zip(chosen, outputs, strict=True):
                found[int(position)] = row
        return np.stack([row for row in found if row is not None])
