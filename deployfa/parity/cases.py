"""The inputs that parity is judged on: real rows, and the shapes at which graphs go wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deployfa.adapter.safetensors_io import read_safetensors, write_safetensors
from deployfa.edits import Array
from deployfa.errors import BundleError
from deployfa.preprocess import Preprocessor

__all__ = ["Case", "make_cases", "narrowed", "of_one_token", "read_cases", "widened", "write_cases"]


@dataclass(frozen=True, eq=False)
class Case:
    """One call: feeds, the float64 truth, and the base's float32 answer with the same head (logits: (batch, labels)).

    ``rows`` are the positions of its rows in the data, ``None`` for a case that repeats rows at another shape;
    ``items`` the same in either case, as long as nobody has stored it.
    """

    feeds: Mapping[str, Array]
    truth: Array | None = None
    base: Array | None = None
    rows: tuple[int, ...] | None = None
    items: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Rows; preprocessors put an input with the batch in front first."""
        return len(next(iter(self.feeds.values())) if self.truth is None else self.truth)


def make_cases(preprocessor: Preprocessor, items: Sequence[Any], *, batch_size: int = 32) -> list[Case]:
    """Every item once, batched by length; and besides: one alone, the shortest, the longest, a batch padded by 7."""
    lengths = preprocessor.lengths(items)
    order = [int(position) for position in np.argsort(lengths, kind="stable")]

    def case(chosen: Sequence[int], *, again: bool = True, length: int | None = None) -> Case:
        feeds = preprocessor.encode([items[i] for i in chosen], length=length)
        return Case(feeds, rows=None if again else tuple(chosen), items=tuple(chosen))

    cases = [case(order[start : start + batch_size], again=False) for start in range(0, len(order), batch_size)]
    cases += [case([position]) for position in dict.fromkeys((0, order[0], order[-1]))]
    last = order[-4:]
    cases.append(case(last, length=min(max(lengths[i] for i in last) + 7, preprocessor.max_length)))
    return cases


def of_one_token(logits: Array) -> Array:
    """(batch, labels) as it is; a decoder's (batch, 1, vocabulary), of the token to come, as (batch, vocabulary)."""
    return logits[:, 0] if logits.ndim == 3 and logits.shape[1] == 1 else logits


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
