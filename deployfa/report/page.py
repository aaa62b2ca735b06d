"""One self-contained HTML page for a demo's report: no network, no script, readable without either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from deployfa.atomic import check_output, write_file
from deployfa.errors import InputError, MissingExtraError
from deployfa.report import sections
from deployfa.report.demo_report import DemoReport
from deployfa.report.latency import latency
from deployfa.report.markup import Html, tag
from deployfa.report.plots import draw
from deployfa.report.style import CSS

__all__ = ["read_report", "write_page"]

# whatever a report holds, a browser fetches nothing and runs nothing for this page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def read_report(path: Path) -> DemoReport:
    """The report in ``path``.  Raises ``InputError`` if it is missing, broken or of another format."""
    advice = "pass the report.json that 'deployfa demo' wrote"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read '{path}' ({error.strerror}); {advice}") from error
    try:
        return msgspec.json.decode(content, type=DemoReport)
    except msgspec.ValidationError as error:
        raise InputError(f"'{path}' is not a report of this version's demo ({error}); {advice}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"'{path}' is not whole JSON ({error}); {advice}") from error


def write_page(report: DemoReport, path: Path, *, force: bool = False) -> Path:
    """Write the page of ``report`` to ``path`` and return it.

    Without matplotlib the page has its tables, and a line that says which extra draws the plots.  Raises
    ``OutputExistsError`` if ``path`` exists, unless ``force``, and ``StorageError``.
    """
    check_output(path, force=force)
    plots: Mapping[str, Html] = {}
    missing = None
    try:
        plots = draw(report)
    except MissingExtraError as error:
        missing = str(error)
    page = _page(report, plots, missing)
    with write_file(path, force=force) as partial:
        partial.write_text(page, encoding="utf-8", newline="\n")
    return path


def _page(report: DemoReport, plots: Mapping[str, Html], missing: str | None) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"deployfa demo: {report.model}"),
        tag("style", Html(CSS)),
    )
    main = tag(
        "main",
        sections.opening(report),
        tag("p", missing, class_="note") if missing else "",
        sections.summary(report),
        sections.accuracy(report, plots),
        sections.placement(report),
        sections.parity(report, plots),
        latency(report, plots),
        sections.sentence(report),
        sections.caveats(report),
        sections.repeating(report),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", main), lang="en") + "\n"
