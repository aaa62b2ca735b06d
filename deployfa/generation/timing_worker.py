"""One way of generating in a process of its own: ``python -m deployfa.generation.timing_worker PARENT_PID``."""

from __future__ import annotations

import gc
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deployfa.bench import protocol as say
from deployfa.bench.worker import peak_memory_bytes, serve, settle
from deployfa.errors import RuntimeTargetError

__all__ = ["GenerationWorker"]

#: Prompts (batch, tokens) and how many new tokens → the tokens of each row, and when the first of each were there.
Generate = Callable[[Sequence[tuple[int, ...]], int], tuple[list[list[int]], float]]


class GenerationWorker:
    """Answers requests one at a time; holds what generates and the current prompts."""

    def __init__(self) -> None:
        self._generate: Generate | None = None
        self._prompts: list[tuple[int, ...]] = []
        self._new = 0

    def answer(self, request: say.Request) -> say.Reply:
        """Raises whatever the contender raises."""
        match request:
            case say.OpenGenerator():
                return self._open(request)
            case say.PreparePrompts():
                random = np.random.default_rng((request.seed, request.batch, request.prompt))
                drawn = random.integers(1, request.vocabulary, (request.batch, request.prompt))
                self._prompts, self._new = [tuple(int(token) for token in row) for row in drawn], request.new
                return self._timed()
            case say.Generate():
                return self._timed()
            case say.Memory():
                return say.Memorised(peak_memory_bytes())
            case _:
                raise RuntimeTargetError(f"this worker generates; {type(request).__name__} is for another one")

    def _open(self, request: say.OpenGenerator) -> say.Opened:
        start = time.perf_counter()
        make = _load_bundle(request) if request.kind == "bundle" else _load_module(request)
        imported = time.perf_counter()
        self._generate = make()
        done = time.perf_counter()
        return say.Opened(import_ms=1e3 * (imported - start), session_ms=1e3 * (done - imported), inputs=())

    def _timed(self) -> say.Generated:
        if self._generate is None or not self._prompts:
            raise RuntimeTargetError("the worker was asked to generate before it was told what; open and prepare first")
        gc.disable()
        try:
            start = time.perf_counter()
            tokens, first = self._generate(self._prompts, self._new)
            done = time.perf_counter()
        finally:
            gc.enable()
        settle()
        short = next((len(row) for row in tokens if len(row) != self._new), None)
        if short is not None:
            raise RuntimeTargetError(f"a row has {short} tokens where {self._new} were asked for")
        digest = hashlib.sha256(msgspec.json.encode(tokens)).hexdigest()
        return say.Generated(1e3 * (first - start), 1e3 * (done - start), digest)


def _load_bundle(request: say.OpenGenerator) -> Callable[[], Generate]:
    from deployfa.bundle import Bundle
    from deployfa.generation.generator import Generator, Request, open_generator
    from deployfa.generation.options import Options

    def make() -> Generate:
        bundle = Bundle.open(request.bundle or "", check_files=False)
        opened = open_generator(bundle, target=request.target, threads=request.threads, spinning=request.spinning)
        # answers of one length: nothing ends them early
        generator = Generator(
            opened.decoder, opened.tokenizer, msgspec.structs.replace(opened.settings, eos_token_ids=[])
        )
        tables = bundle.manifest.tables
        names = [member.name for member in tables.adapters][1:] if tables is not None else [None]

        def generate(prompts: Sequence[tuple[int, ...]], new: int) -> tuple[list[list[int]], float]:
            options = Options(max_new_tokens=new)
            # of a pack, as many adapters as there are rows
            asked = [
                Request(prompt=prompt, options=options, adapter=names[number % len(names)])
                for number, prompt in enumerate(prompts)
            ]
            tokens: list[list[int]] = [[] for _ in prompts]
            first = 0.0
            for count, piece in enumerate(generator.stream(asked, batch_size=len(asked)), start=1):
                tokens[piece.row].append(piece.token)
                if count == len(asked):
                    first = time.perf_counter()
            return tokens, first

        return generate

    return make


def _load_module(request: say.OpenGenerator) -> Callable[[], Generate]:
    import torch
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(request.threads)

    class Clock(BaseStreamer):
        """``generate`` hands it the prompts, then the tokens of every step."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def make() -> Generate:
        model: Any = _module(request)
        # answers of one length: nothing ends them early
        for config in (model.config, model.generation_config):
            config.eos_token_id = None

        def generate(prompts: Sequence[tuple[int, ...]], new: int) -> tuple[list[list[int]], float]:
            ids, clock = torch.tensor(prompts), Clock()
            with torch.inference_mode():
                found = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    repetition_penalty=1.0,
                    pad_token_id=0,
                    streamer=clock,
                )
            return [[int(token) for token in row] for row in found[:, ids.shape[1] :]], clock.times[1]

        return generate

    return make


def _module(request: say.OpenGenerator) -> Any:
    from deployfa.training.base import load_base
    from deployfa.training.reference import adapted_model

    if request.adapter is not None:
        return adapted_model(Path(request.adapter), request.model)
    return load_base(request.model or "", "text-generation", labels=None).model


if __name__ == "__main__":
    sys.exit(serve(GenerationWorker()))
