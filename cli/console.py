"""Printing: tables and JSON on standard output, progress and warnings on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from deployfa.bundle import Bundle

__all__ = ["done", "print_json", "progress_bar", "recorded", "show", "spinner", "warn"]


def show(*parts: RenderableType) -> None:
    """Tables and text on standard output; full width when it is not a terminal, so that no column is cut."""
    from rich.console import Console

    # texts, labels and paths are data: '[/b]' or ':smile:' in them is no markup of ours
    width = None if sys.stdout.isatty() else 200
    console = Console(width=width, markup=False, emoji=False)
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


def recorded(bundle: Bundle, **summary: dict[str, Any]) -> None:
    """Put a summary into the bundle's manifest; a bundle on a read-only disk is worth a warning, not the result."""
    from deployfa.errors import StorageError

    try:
        bundle.record(**summary)
    except StorageError as error:
        warn([f"the manifest does not keep this result: {error}"])


def done(message: str) -> None:
    """A closing line on standard error, so that ``--json`` stays clean."""
    print(message, file=sys.stderr)


@contextlib.contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on; yields the function that changes it.  Plain lines without a terminal."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        yield lambda message: print(f"· {message}", file=sys.stderr)
        return
    with console.status(text) as status:
        yield lambda message: status.update(message)


@contextlib.contextmanager
def progress_bar(*, refreshes_per_s: float = 10) -> Iterator[Callable[[str, float, float], None]]:
    """A progress bar on standard error; yields ``report(what, done, total)``, one bar for each ``what``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, Any] = {}
    with Progress(
        *columns, console=console, disable=not console.is_terminal, refresh_per_second=refreshes_per_s
    ) as progress:

        def report(what: str, done: float, total: float) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield report
