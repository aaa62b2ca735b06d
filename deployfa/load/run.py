"""``run_load``: one run at one rate."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from deployfa.load.options import LoadOptions
from deployfa.load.prepare import Progress, prepare
from deployfa.load.report import LoadReport

__all__ = ["in_loop", "run_load"]

T = TypeVar("T")


def run_load(options: LoadOptions, *, progress: Progress | None = None) -> LoadReport:
    """One run.  Ctrl-C ends it early; the report says ``interrupted``.

    Raises ``LoadError`` for a server that is not there or refuses a first request, ``InputError`` for a model or an
    adapter that it lacks, ``MissingExtraError`` without aiohttp.
    """

    async def work() -> LoadReport:
        async with prepare(options) as prepared:
            return await prepared.report(options.rate, options.duration, 0, progress)

    return in_loop(work())


def in_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in uvloop where it is installed.  Ctrl-C cancels, and ``open_loop`` makes an early end of it."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)
