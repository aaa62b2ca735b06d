"""``deployfa run`` of a bundle that generates: tokens as they come for one prompt, whole answers for several."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deployfa.cli.console import print_json
from deployfa.cli.run_slots import swap
from deployfa.errors import DataError, InputError
from deployfa.runtimes.slots import SlotRunner

if TYPE_CHECKING:
    from deployfa.bundle import Bundle
    from deployfa.generation.generator import Completion, Generator, Request
    from deployfa.generation.options import Options

__all__ = ["Generated", "GenerationReport", "read_prompts", "run_generation"]


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and its answer; see ``deployfa.generation.generator.Completion``."""

    prompt: str
    adapter: str | None = None
    text: str
    token_ids: list[int]
    finish: str
    prompt_tokens: int
    ttft_ms: float
    tokens_per_second: float | None


class GenerationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``run --json`` for a bundle that generates.  tokens_per_second: of all answers together, from the
    first prompt to the last token."""

    bundle: str
    patch: str | None = None
    tokens_per_second: float
    answers: list[Generated]


def read_prompts(path: Path) -> list[str]:
    """Prompts from a .txt, one a line, or from the text column of a CSV or JSONL file.

    Raises ``DataError`` where there are none.
    """
    from deployfa.data import read_rows

    if path.suffix.lower() != ".txt":
        return [row.text for row in read_rows(path, need_label=False)]
    try:
        # split at line feeds only: str.splitlines also cuts at characters that a prompt may hold
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read as UTF-8 text ({error}); pass a file with a prompt a line") from error
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"'{path}' has no prompts; write one a line")
    return prompts


def run_generation(
    bundle: Bundle,
    prompts: Sequence[str],
    options: Options,
    *,
    adapters: list[str],
    strength: float | None,
    chat: bool,
    target: str | None,
    threads: int | None,
    patch: Path | None,
    json: bool,
) -> None:
    """Answer ``prompts`` with ``options``; each draws with a seed of its own, ``options.seed`` and those after it."""
    from deployfa.generation.generator import open_generator

    if not prompts:
        raise InputError('nothing to go on from; pass --prompt "..." or --prompts FILE')
    generator = open_generator(bundle, target=target, threads=threads)
    if isinstance(generator.decoder.runner, SlotRunner):
        swap(bundle, generator.decoder.runner, adapters)
        adapters = []
    if len(adapters) not in {0, 1, len(prompts)}:
        raise InputError(f"{len(adapters)} adapters for {len(prompts)} prompts; name one for all, or one for each")
    names: list[str | None] = [*adapters] * (len(prompts) if len(adapters) == 1 else 1) or [None] * len(prompts)
    requests = _requests(bundle, prompts, options, names, strength, chat)
    if json:
        print_json(_report(bundle, patch, generator, prompts, requests))
    elif len(prompts) == 1:
        for piece in generator.stream(requests):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        for number, completion in generator.completions(requests):
            whose = f" ({names[number]})" if names[number] is not None else ""
            # as it is: rich would expand tabs
            sys.stdout.write(f"[{number + 1}]{whose} {prompts[number]}\n{completion.text}\n\n")


def _requests(
    bundle: Bundle,
    prompts: Sequence[str],
    options: Options,
    names: Sequence[str | None],
    strength: float | None,
    chat: bool,
) -> list[Request]:
    from deployfa.generation.chat import Message, open_chat_template, render
    from deployfa.generation.generator import Request

    texts = list(prompts)
    if chat:
        template, special = open_chat_template(bundle)
        texts = render(template, [[Message("user", prompt)] for prompt in prompts], special)
    found = []
    for number, (text, name) in enumerate(zip(texts, names, strict=True)):
        seed = None if options.seed is None else options.seed + number
        own = msgspec.structs.replace(options, seed=seed)
        found.append(Request(prompt=text, options=own, special=not chat, adapter=name, strength=strength))
    return found


def _report(
    bundle: Bundle, patch: Path | None, generator: Generator, prompts: Sequence[str], requests: Sequence[Request]
) -> GenerationReport:
    start = time.perf_counter()
    completions = generator.generate(requests)
    took = time.perf_counter() - start
    return GenerationReport(
        bundle=str(bundle.path),
        patch=None if patch is None else str(patch),
        tokens_per_second=sum(len(each.token_ids) for each in completions) / took,
        answers=[
            _generated(prompt, request, completion)
            for prompt, request, completion in zip(prompts, requests, completions, strict=True)
        ],
    )


def _generated(prompt: str, request: Request, completion: Completion) -> Generated:
    return Generated(prompt=prompt, adapter=request.adapter, **msgspec.structs.asdict(completion))
