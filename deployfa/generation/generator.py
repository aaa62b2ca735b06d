"""``Generator``: prompts in, tokens out as they come; several at once, each with its own options and adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.errors import BundleError, InputError
from deployfa.generation.batch import PREFILL_CHUNK, Batch
from deployfa.generation.decoder import Decoder, Run, open_decoder
from deployfa.generation.options import Options
from deployfa.generation.sampling import Sampler
from deployfa.generation.text import TextStream, Tokenizer
from deployfa.preprocess import Generation
from deployfa.runtimes.slots import Current, SlotAdapter
from deployfa.tables import AdapterTable

__all__ = ["BATCH_SIZE", "Completion", "Finish", "Generator", "Piece", "Request", "open_generator"]

#: Why an answer ended: a stop token, ``max_new_tokens`` or the end of the context, a stop string.
Finish = Literal["stop", "length", "stop string"]

BATCH_SIZE = 16


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt.  prompt: a text, or token ids, to which nothing is added.  special: whether the tokenizer adds its
    own tokens to a text; a chat template has written them.  adapter: of a pack; strength: of a pack or of slots, in
    [0, 1]."""

    prompt: str | tuple[int, ...]
    options: Options = Options()
    special: bool = True
    adapter: str | None = None
    strength: float | None = None


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One token of one answer.  row: whose, by position among the requests.  text: what became certain with it, often
    nothing or more than the token's own.  finish: why this was the last one."""

    row: int
    token: int
    text: str
    finish: Finish | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One whole answer.  text: without the prompt, special tokens and the stop string.  token_ids: all that were
    generated, a stop token among them.  ttft_ms: to the first token, from when the batch that it was in began;
    tokens_per_second: of this answer after that, ``None`` for a single token."""

    text: str
    token_ids: list[int]
    finish: Finish
    prompt_tokens: int
    ttft_ms: float
    tokens_per_second: float | None


@dataclass
class _Row:
    """An answer in the making.  room: how many tokens it may have; began, first: when its batch and its first token
    were there, in seconds."""

    number: int
    prompt: list[int]
    room: int
    sampler: Sampler
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    began: float = 0.0
    first: float = 0.0

    def take(self, logits: Array, stops: frozenset[int]) -> Piece:
        """The next token, chosen from ``logits``, (vocabulary,)."""
        token = self.sampler.pick(logits)
        self.tokens.append(token)
        finish: Finish | None = None
        # a stop token is no text, whether or not the tokenizer calls it special
        text = "" if token in stops else self.stream.push(token)
        if token in stops:
            finish = "stop"
        elif self.stream.stopped:
            finish = "stop string"
        elif len(self.tokens) == self.room:
            finish = "length"
        if finish in {"stop", "length"}:
            text += self.stream.flush()
        self.texts.append(text)
        if len(self.tokens) == 1:
            self.first = time.perf_counter()
        return Piece(row=self.number, token=token, text=text, finish=finish)

    def completion(self, finish: Finish) -> Completion:
        took, more = time.perf_counter() - self.first, len(self.tokens) - 1
        return Completion(
            text="".join(self.texts),
            token_ids=self.tokens,
            finish=finish,
            prompt_tokens=len(self.prompt),
            ttft_ms=1e3 * (self.first - self.began),
            tokens_per_second=more / took if more and took > 0 else None,
        )


class Generator:
    """A decoder, its tokenizer, and where it stops.  Thread-safe: what a generation knows lies in its iterator."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, settings: Generation) -> None:
        self.decoder, self.tokenizer, self.settings = decoder, tokenizer, settings
        self._stops = frozenset(settings.eos_token_ids)

    def stream(
        self,
        requests: Sequence[Request],
        *,
        slot: SlotAdapter | Current | None = "current",
        batch_size: int = BATCH_SIZE,
        chunk: int = PREFILL_CHUNK,
    ) -> Iterator[Piece]:
        """The tokens of all answers as they come: one piece a row and step, until each has a ``finish``.

        slot: of a bundle with slots, the adapter of all, ``None`` for the base.  batch_size: more requests than that
        take turns, those of like length together.  chunk: how many tokens of a prompt are read at once; it bounds
        memory.  Close the iterator to stop early: nothing runs on.

        Raises ``InputError`` at once for a prompt that is empty, no text, or too long; for adapters that there are not,
        and whatever the runtime raises, with the first piece.
        """
        return self._pieces(requests, self._rows(requests, batch_size, chunk), slot, batch_size, chunk)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        slot: SlotAdapter | Current | None = "current",
        batch_size: int = BATCH_SIZE,
        chunk: int = PREFILL_CHUNK,
    ) -> list[Completion]:
        """``stream`` to its end: the answers in the order of ``requests``."""
        found: dict[int, Completion] = {}
        for number, completion in self.completions(requests, slot=slot, batch_size=batch_size, chunk=chunk):
            found[number] = completion
        return [found[number] for number in range(len(requests))]

    def completions(
        self,
        requests: Sequence[Request],
        *,
        slot: SlotAdapter | Current | None = "current",
        batch_size: int = BATCH_SIZE,
        chunk: int = PREFILL_CHUNK,
    ) -> Iterator[tuple[int, Completion]]:
        """``stream``, whole answers in the order in which they end, each with its position among ``requests``."""
        rows = self._rows(requests, batch_size, chunk)
        known = {row.number: row for row in rows}
        for piece in self._pieces(requests, rows, slot, batch_size, chunk):
            if piece.finish is not None:
                yield piece.row, known[piece.row].completion(piece.finish)

    def _pieces(
        self,
        requests: Sequence[Request],
        rows: list[_Row],
        slot: SlotAdapter | Current | None,
        batch_size: int,
        chunk: int,
    ) -> Iterator[Piece]:
        adapters, strengths = [each.adapter for each in requests], [each.strength for each in requests]
        if not rows:
            return
        with self.decoder.adapted(adapters, strengths, slot=slot) as run:
            for start in range(0, len(rows), batch_size):
                yield from self._batch(run, rows[start : start + batch_size], chunk)

    def _batch(self, run: Run, live: list[_Row], chunk: int) -> Iterator[Piece]:
        began = time.perf_counter()
        for row in live:
            row.began = began
        batch = Batch(
            self.decoder,
            run,
            [row.prompt for row in live],
            requests=[row.number for row in live],
        )
        logits = batch.prefill(chunk=chunk)
        while True:
            done = []
            for place, row in enumerate(live):
                piece = row.take(logits[place], self._stops)
                if piece.finish is not None:
                    done.append(place)
                yield piece
            if len(done) == len(live):
                return
            if done:
                live = [live[place] for place in batch.drop(done)]
            logits = batch.advance([row.tokens[-1] for row in live])

    def _rows(self, requests: Sequence[Request], batch_size: int, chunk: int) -> list[_Row]:
        """Checked, the shortest prompt first: padding is read like everything else."""
        if batch_size < 1 or chunk < 1:
            raise InputError("a batch and a chunk hold something; pass 1 or more")
        rows = [self._row(number, request) for number, request in enumerate(requests)]
        return sorted(rows, key=lambda row: len(row.prompt))

    def _row(self, number: int, request: Request) -> _Row:
        prompt, options, most = self._prompt(number, request), request.options, self.settings.max_positions
        room = most - len(prompt)
        if room < 1:
            raise InputError(
                f"prompt {number + 1} has {len(prompt)} tokens, and prompt and answer together have {most} at most; "
                "shorten it"
            )
        asked = room if options.max_new_tokens is None else options.max_new_tokens
        if asked > room:
            raise InputError(
                f"prompt {number + 1} has {len(prompt)} tokens, which leaves room for {room} of {most}, and {asked} "
                f"are asked for; pass --max-new-tokens {room}, or shorten the prompt"
            )
        stream = TextStream(self.tokenizer, prompt, options.stop)
        return _Row(number, prompt, asked, Sampler(options, prompt), stream)

    def _prompt(self, number: int, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            ids = self.tokenizer.encode(request.prompt, special=request.special)
        else:
            ids = list(request.prompt)
        if not ids:
            raise InputError(f"prompt {number + 1} has no tokens; write something for the model to go on from")
        size = self.decoder.vocabulary
        if size is not None and not (min(ids) >= 0 and max(ids) < size):
            raise InputError(f"prompt {number + 1} has a token id outside 0 to {size - 1}; use the model's tokenizer")
        return ids


def open_generator(
    bundle: Bundle,
    *,
    table: AdapterTable | None = None,
    target: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
) -> Generator:
    """The generator of a bundle exported for text generation; ``table``: see ``MixedRunner``.

    Raises ``BundleError`` for a bundle of another task, and what opening its graph and its tokenizer raises.
    """
    decoder = open_decoder(bundle, table=table, target=target, threads=threads, spinning=spinning)
    settings = bundle.manifest.preprocessing.generation
    if settings is None:
        raise BundleError(f"the manifest of '{bundle.path}' does not say how to generate; export it again")
    return Generator(decoder, Tokenizer(bundle.path), settings)
