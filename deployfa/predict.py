"""Answer texts or pictures with a bundle: tokenizers or Pillow and a runtime, no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_bundle, open_slots
from deployfa.edits import Array
from deployfa.errors import BundleError, InputError
from deployfa.mixed import MixedRunner
from deployfa.preprocess import ImagePreprocessor, open_preprocessor
from deployfa.runtimes.runner import Runner
from deployfa.runtimes.slots import Current, SlotAdapter, SlotRunner
from deployfa.tables import AdapterTable, Lease

__all__ = ["Answer", "Predictor", "RunReport"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The label of one text or picture; ``score`` is its softmax probability in [0, 1], ``scores`` that of every label.

    ``adapter``: whose answer it is, in a pack.  ``image``: the path of the picture, or its number if it has none.
    """

    text: str | None = None
    image: str | None = None
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
    """A session and a tokenizer, made once, asked often.  table: see ``MixedRunner``.  target: of
    ``deployfa.runtimes.targets``, by default the bundle's own; engine: which one, where it has several for that target.

    ``slots``: of a bundle exported with slots, what swaps its adapter; ``None`` of any other.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        table: AdapterTable | None = None,
        target: str | None = None,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        manifest = bundle.manifest
        target = target or manifest.target
        #: what it is asked: ``text`` or ``image``
        self.kind = manifest.preprocessing.kind
        if self.kind not in {"text", "image"}:
            raise BundleError(f"'{bundle.path}' reads {self.kind}, not text and no pictures")
        self._preprocessor = open_preprocessor(bundle.path, manifest.preprocessing)
        self._mixed, self.slots = None, None
        if manifest.tables is not None:
            self._mixed = MixedRunner(bundle, table, target=target, engine=engine, threads=threads)
        if manifest.slots is not None:
            self.slots = open_slots(bundle, target=target, engine=engine, threads=threads)
        self._runner: MixedRunner | SlotRunner | Runner = (
            self._mixed or self.slots or open_bundle(bundle, target, engine=engine, threads=threads)
        )
        self._names = [spec.name for spec in self._runner.inputs]
        self._output = manifest.graph.outputs[0].name
        self._labels = bundle.labels
        self._idle_labels = manifest.slots.labels if manifest.slots is not None else []

    @property
    def adapters(self) -> list[str]:
        """The names of a pack's adapters, the base's first; empty for any other bundle."""
        return self._mixed.adapters if self._mixed is not None else []

    def answer(
        self,
        items: Sequence[Any],
        *,
        adapters: Sequence[str] | None = None,
        strength: float | None = None,
        slot: SlotAdapter | Current | None = "current",
        batch_size: int = 32,
    ) -> Iterator[Answer]:
        """Answers in the order of ``items``, once all are there: rows are batched by length, whatever their adapters.

        items: texts, or what ``deployfa.preprocess.picture`` calls a picture.  adapters: of a pack, one for each;
        strength: how much of them, 0 the base's features, 1 all; slot: of a bundle with slots, the adapter of this
        call, ``None`` for the base.  An answer has its adapter's own labels.
        """
        slot = self._in_slots(slot)
        with self._lease() as lease:
            # the labels are those of the adapters that answered, whoever replaces one meanwhile
            logits = self._logits(items, adapters, strength, slot, batch_size, lease)
            named = {name: self._labels_of(name, lease) for name in adapters or ()}
        for number, item in enumerate(items):
            adapter = adapters[number] if adapters is not None else None
            row = logits[number][~np.isneginf(logits[number])]
            if self.slots is not None:
                labels = self._idle_labels if slot is None else list(slot.labels)
            else:
                labels = self._labels if adapter is None else named[adapter]
            labels = labels or [f"LABEL_{position}" for position in range(len(row))]
            if len(labels) != len(row):
                whose, again = ("adapter", "convert") if slot is not None else ("bundle", "export")
                raise BundleError(f"the {whose} names {len(labels)} labels for {len(row)} outputs; {again} it again")
            shifted = np.exp(row - row.max())
            scores = {label: float(p) for label, p in zip(labels, shifted / shifted.sum(), strict=True)}
            best = labels[int(row.argmax())]
            asked = {"text": item} if self.kind == "text" else {"image": _name(item, number)}
            yield Answer(**asked, adapter=adapter, label=best, score=scores[best], scores=scores)

    def logits(
        self,
        items: Sequence[Any],
        *,
        adapters: Sequence[str] | None = None,
        strength: float | None = None,
        slot: SlotAdapter | Current | None = "current",
        batch_size: int = 32,
    ) -> Array:
        """(len(items), labels), float32; minus infinity where a pack's adapter has fewer labels than another."""
        with self._lease() as lease:
            return self._logits(items, adapters, strength, self._in_slots(slot), batch_size, lease)

    def _logits(
        self,
        items: Sequence[Any],
        adapters: Sequence[str] | None,
        strength: float | None,
        slot: SlotAdapter | None,
        batch_size: int,
        lease: Lease | None,
    ) -> Array:
        self._check(items, adapters, strength)
        order = np.argsort(self._preprocessor.lengths(items), kind="stable")
        found: list[Array | None] = [None] * len(items)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            feeds = self._encode(items, chosen)
            wanted = {name: feeds[name] for name in self._names}
            if isinstance(self._runner, MixedRunner):
                named = [(adapters or ())[i] for i in chosen]
                outputs = self._runner.run(wanted, named, strength=strength, lease=lease)[self._output]
            elif isinstance(self._runner, SlotRunner):
                outputs = self._runner.run(wanted, slot, strength=strength)[self._output]
            else:
                outputs = self._runner.run(wanted)[self._output]
            for position, row in zip(chosen, outputs, strict=True):
                found[int(position)] = row
        return np.stack([row for row in found if row is not None])

    def _encode(self, items: Sequence[Any], chosen: Iterable[int]) -> dict[str, Array]:
        """An error names a picture by its place among all of them."""
        if isinstance(self._preprocessor, ImagePreprocessor):
            return self._preprocessor.encode([items[i] for i in chosen], names=[_name(items[i], i) for i in chosen])
        return self._preprocessor.encode([items[i] for i in chosen])

    def _lease(self) -> contextlib.AbstractContextManager[Lease | None]:
        return self._mixed.lease() if self._mixed is not None else contextlib.nullcontext()

    def _labels_of(self, adapter: str, lease: Lease | None) -> list[str]:
        return list(self._mixed.labels(adapter, lease)) if self._mixed is not None else self._labels

    def _in_slots(self, slot: SlotAdapter | Current | None) -> SlotAdapter | None:
        """The adapter of one call, the same for all its batches whoever swaps meanwhile."""
        if isinstance(slot, str):
            return self.slots.current if self.slots is not None else None
        if self.slots is None and slot is not None:
            raise InputError("the bundle has no slots for another adapter; export it with --slots")
        return slot

    def _check(self, items: Sequence[Any], adapters: Sequence[str] | None, strength: float | None) -> None:
        if self._mixed is None:
            if adapters is not None or (strength is not None and self.slots is None):
                raise InputError(
                    "the bundle holds one adapter; leave --adapter and --strength out, or make a pack: deployfa pack"
                )
            return
        if adapters is None:
            names = self.adapters
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            raise InputError(f"name the adapter that answers with --adapter; there are: {', '.join(names[:6])}{more}")
        if len(adapters) != len(items):
            raise InputError(f"{len(adapters)} adapters for {len(items)} {self._what}; name one for all, or one each")

    @property
    def _what(self) -> str:
        return "texts" if self.kind == "text" else "pictures"


def _name(picture: Any, number: int) -> str:
    return str(picture) if isinstance(picture, str | Path) else f"picture {number + 1}"
