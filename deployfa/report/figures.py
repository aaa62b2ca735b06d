"""Figures of a report as text: the same on the page and in the terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from deployfa.bench import Result
from deployfa.report.demo_report import DemoReport, MethodResult

__all__ = [
    "DASH",
    "TRAINING_DOMAIN",
    "domains",
    "figure",
    "listed",
    "percent",
    "plain",
    "ratio",
    "scientific",
    "shape",
    "shifted",
    "shifted_mean",
]

#: Stands for a figure that the samples do not support, or that was not measured.
DASH = "–"
#: Where the methods were trained; every other domain is shifted.
TRAINING_DOMAIN = "movies"

# they turn the text after them round, so that a reader sees something else than what is there
_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: str) -> str:
    """``text`` on one line without control characters: neither a terminal nor an XML parser can stumble over it."""
    return "".join(map(_printable, text))


def figure(value: float | None) -> str:
    """Three or more significant digits: 0.123, 1.23, 12.3, 123, 1,234."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    size = abs(value)
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:,.{decimals}f}"


def scientific(value: float | None, decimals: int) -> str:
    """1.23e-07; ∞ for an error that is not finite, which a report keeps as ``None``."""
    return "∞" if value is None else f"{value:.{decimals}e}"


def percent(fraction: float | None, decimals: int = 1) -> str:
    """0.8012 is 80.1; the % stands in the heading."""
    return DASH if fraction is None else f"{100 * fraction:.{decimals}f}"


def ratio(result: Result) -> str:
    """The ratio to the reference with its 95 % interval; the reference itself is 1."""
    if result.verdict == "reference":
        return "1"
    if result.ratio is None or result.ratio_low is None or result.ratio_high is None:
        return DASH
    return f"{result.ratio:.3f} [{result.ratio_low:.3f}, {result.ratio_high:.3f}]"


def shape(result: Result) -> str:
    """Batch by sequence, as ``bench --shapes`` takes it."""
    return f"{result.batch}x{result.sequence}"


def domains(report: DemoReport) -> list[str]:
    """Every domain that any method was scored on, the training domain first."""
    found = dict.fromkeys(name for method in report.methods for name in method.scores)
    return sorted(found, key=lambda name: name != TRAINING_DOMAIN)


def shifted(report: DemoReport) -> list[str]:
    """The domains that nothing was trained on."""
    return [name for name in domains(report) if name != TRAINING_DOMAIN]


def shifted_mean(method: MethodResult, names: Sequence[str]) -> float | None:
    """Mean balanced accuracy over ``names``; ``None`` unless the method was scored on all of them."""
    if not names or any(name not in method.scores for name in names):
        return None
    return sum(method.scores[name].balanced_accuracy for name in names) / len(names)


def listed(names: Sequence[str]) -> str:
    """``tweets, amazon, nyt``."""
    return ", ".join(plain(name) for name in names)


def _printable(character: str) -> str:
    if character.isspace():
        return " "
    if character in _BIDIRECTIONAL or unicodedata.category(character) in {"Cc", "Cs"}:
        return "\ufffd"
    return character
