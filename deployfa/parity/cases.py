"""The inputs that parity is judged on: real rows, and the shapes at which graphs go wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deployfa.adapter.safetensors_io import read_safetensors, write_safetensors
from deployfa.edits import Array
from deployfa.errors import BundleError
from deployfa.preprocess import TextPreprocessor

__all__ = ["SENTENCES", "Case", "narrowed", "read_cases", "text_cases", "widened", "write_cases"]

_SUBJECTS = (
    "The film",
    "This phone",
    "The service here",
    "My new laptop",
    "The battery",
    "The committee's report",
)
_REMARKS = (
    "was a joy.",
    "is dreadful!",
    "could have been worse.",
    "never gets going, sadly.",
    "surprised all of us.",
    "does what it says.",
    "is not as bad as they claim.",
    "left me cold :(",
    "deserves every prize it won.",
    "broke after 3 days.",
    "will be discussed on Tuesday.",
)
#: Used when no data is given.  Many rows, because the ratio of two noises scatters by about 1/sqrt(rows); short ones,
#: because float64 in numpy is slow; a few long and odd ones.
SENTENCES = (
    "The plot was good, but the characters are uncompelling and the dialogue is not great.",
    "ok",
    "Not the worst thing I have seen this year, though 1999's original did more with a tenth of the money :-(",
    "Smart, funny and handsome — everything its dull, lumbering, over-long predecessor was not.",
    *(f"{subject} {remark}" for subject in _SUBJECTS for remark in _REMARKS),
)


@dataclass(frozen=True, eq=False)
class Case:
    """One call: feeds, the float64 truth, and the base's float32 answer with the same head (logits: (batch, labels)).

    ``rows`` are the positions of its rows in the data, ``None`` for a case that repeats rows at another shape.
    """

    feeds: Mapping[str, Array]
    truth: Array | None = None
    base: Array | None = None
    rows: tuple[int, ...] | None = None


def text_cases(preprocessor: TextPreprocessor, texts: Sequence[str], *, batch_size: int = 32) -> list[Case]:
    """Every row once, batched by length; and besides: one row alone, the shortest, the longest, a batch padded by 7."""
    lengths = preprocessor.lengths(texts)
    order = np.argsort(lengths, kind="stable")
    cases = [
        Case(preprocessor.encode([texts[i] for i in chunk]), rows=tuple(int(i) for i in chunk))
        for chunk in (order[start : start + batch_size] for start in range(0, len(order), batch_size))
    ]
    for position in dict.fromkeys((0, int(order[0]), int(order[-1]))):
        cases.append(Case(preprocessor.encode([texts[position]])))
    padded = [texts[i] for i in order[-4:]]
    width = min(max(preprocessor.lengths(padded)) + 7, preprocessor.max_length)
    cases.append(Case(preprocessor.encode(padded, length=width)))
    return cases


def widened(case: Case, labels: int) -> Case:
    """``case`` with answers of so many labels: what is not there is minus infinity, as a masked head answers."""

    def wide(answer: Array | None) -> Array | None:
        if answer is None or answer.shape[-1] >= labels:
            return answer
        return np.pad(answer, ((0, 0), (0, labels - answer.shape[-1])), constant_values=-np.inf)

    return dataclasses.replace(case, truth=wide(case.truth), base=wide(case.base))


def narrowed(answer: Array, case: Case) -> Array:
    """``answer`` in as many labels as the truth of ``case`` has; what is beyond must be masked, or it is none: NaN."""
    labels = answer.shape[-1] if case.truth is None else case.truth.shape[-1]
    if np.isneginf(answer[..., labels:]).all():
        return answer[..., :labels]
    return np.full_like(answer[..., :labels], np.nan)


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """Store cases with their truth as safetensors."""
    tensors: dict[str, Array] = {}
    for number, case in enumerate(cases):
        assert case.truth is not None and case.base is not None  # stored only once computed
        tensors |= {f"{number}/feeds/{name}": array for name, array in case.feeds.items()}
        tensors |= {f"{number}/truth": case.truth, f"{number}/base": case.base}
    write_safetensors(path, tensors, {"format": "deployfa-reference/1", "cases": str(len(cases))})


def read_cases(path: Path) -> list[Case]:
    """The inverse of ``write_cases``; raises ``BundleError`` if the file is not one."""
    tensors, header = read_safetensors(path)
    if header.get("format") != "deployfa-reference/1" or not header.get("cases", "").isdigit():
        raise BundleError(f"'{path}' holds no reference outputs; export the bundle again")
    cases = []
    for number in range(int(header["cases"])):
        prefix = f"{number}/feeds/"
        feeds = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
        truth, base = tensors.get(f"{number}/truth"), tensors.get(f"{number}/base")
        if not feeds or truth is None or base is None:
            raise BundleError(f"'{path}' lacks case {number}; export the bundle again")
        cases.append(Case(feeds, truth, base))
    return cases
