"""HTML that cannot forget to escape: whatever is not ``Html`` already is text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from deployfa.report.figures import plain

__all__ = ["Html", "drawn", "table", "tag"]

_VOID = {"br", "meta"}


class Html(str):
    """Markup, ready to be written; only ``tag``, ``table`` and the plots make any."""

    __slots__ = ()


def tag(element: str, /, *children: str | Iterable[Html], **attributes: str) -> Html:
    """``<element attributes>children</element>``; ``class_`` is ``class``, ``aria_label`` is ``aria-label``.

    A child that is a plain string is escaped, and so is every attribute.
    """
    spelt = "".join(f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"' for key, value in attributes.items())
    if element in _VOID:
        return Html(f"<{element}{spelt}>")
    inner = "".join(_child(child) for child in children)
    return Html(f"<{element}{spelt}>{inner}</{element}>")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = ()) -> Html:
    """A table that scrolls by itself on a narrow screen.

    The first column names the row; the others hold figures, aligned right, except those whose index is in ``words``.
    """
    headings = [tag("th", each, scope="col", class_=_align(i, words)) for i, each in enumerate(head)]
    body = []
    for row in rows:
        first = tag("th", row[0], scope="row", class_="word")
        body.append(tag("tr", first, *(tag("td", each, class_=_align(i, words)) for i, each in enumerate(row[1:], 1))))
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", headings)), tag("tbody", body))
    # a scrolling box must be reachable from the keyboard
    return tag("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def drawn(plots: Mapping[str, Html], name: str, caption: str) -> Html:
    """The plot with its caption; nothing where it could not be drawn."""
    return tag("figure", plots[name], tag("figcaption", caption)) if name in plots else Html()


def _align(index: int, words: Sequence[int]) -> str:
    return "word" if index == 0 or index in words else "figure"


def _child(child: str | Iterable[Html]) -> str:
    if isinstance(child, Html):
        return child
    return _text(child) if isinstance(child, str) else "".join(_child(each) for each in child)


def _text(value: str) -> str:
    return str(value) if isinstance(value, Html) else html.escape(plain(value))
