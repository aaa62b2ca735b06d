"""Printing: tables and JSON on standard output, progress and warnings on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["done", "print_json", "progress_bar", "show", "spinner", "warn"]


def show(*parts: RenderableType) -> None:
    """Tables and text on standard output; full width when it is not a terminal, so that no column is cut."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=200)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")


def warn(messages: Iterable[str]) -> None:
    """``warning: …`` lines on standard error."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


def done(message: str) -> None:
    """A closing line on standard error, so that ``--json`` stays clean."""
    print(message, file=sys.stderr)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on; yields the function that changes it.  Plain lines without a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: print(f"· {message}", file=sys.stderr)
        return
    with console.status(text) as status:
        yield lambda message: status.update(message)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float, float], None]]:
    """A progress bar on standard error; yields ``report(what, done, total)``, one bar for each ``what``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(what: str, done: float, total: float) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield report
