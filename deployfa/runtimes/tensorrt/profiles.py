"""Which sizes an engine takes: the smallest, the one it is tuned for, and the largest of every dynamic dimension.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-dynamic-shapes.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from deployfa.edits import Array
from deployfa.errors import InputError, RuntimeTargetError
from deployfa.runtimes.runner import TensorSpec

__all__ = ["Sizes", "check_profile", "dimensions", "parse_profile", "resolve_profile", "shape_range"]

#: A size is a 32-bit integer.
_LARGEST = 2**31 - 1
_DIGITS = 20


class Sizes(msgspec.Struct, frozen=True):
    """Of one dimension, as ``--profile`` writes it: minimum, optimum, maximum."""

    minimum: int
    optimum: int
    maximum: int

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimum},{self.maximum}"


def parse_profile(texts: Iterable[str]) -> dict[str, Sizes]:
    """``batch=1,4,16`` → ``{"batch": Sizes(1, 4, 16)}``; one number alone stands for all three.

    Raises ``InputError`` on anything else.
    """
    profile: dict[str, Sizes] = {}
    for text in texts:
        name, equals, numbers = text.partition("=")
        parts = [part.strip() for part in numbers.split(",")]
        if not equals or not name or len(parts) not in {1, 3} or not all(part.isdecimal() for part in parts):
            raise InputError(f"'{text}' is no profile; write it as NAME=MIN,OPT,MAX, such as batch=1,4,16")
        if name in profile:
            raise InputError(f"two profiles for '{name}'; pass one")
        # Python itself refuses to read thousands of digits
        if any(len(part) > _DIGITS for part in parts):
            raise InputError(f"a size of '{name}' has more than {_DIGITS} digits; the largest size is {_LARGEST}")
        sizes = Sizes(*(int(part) for part in (parts * 3 if len(parts) == 1 else parts)))
        if not 0 <= sizes.minimum <= sizes.optimum <= sizes.maximum or sizes.maximum == 0:
            raise InputError(f"'{text}' is out of order; sizes go from the smallest to the largest: {name}=1,4,16")
        if sizes.maximum > _LARGEST:
            raise InputError(f"'{text}' is more than an engine can take; the largest size is {_LARGEST}")
        profile[name] = sizes
    return profile


def dimensions(inputs: Sequence[TensorSpec]) -> list[str]:
    """The names that a profile must give sizes to.  ``past+sequence`` is a sum of others and needs none of its own."""
    found: dict[str, None] = {}
    for spec in inputs:
        for size in spec.shape:
            if isinstance(size, str):
                found |= dict.fromkeys(part for part in _terms(size) if not part.isdecimal())
    return list(found)


def resolve_profile(
    inputs: Sequence[TensorSpec], given: Mapping[str, Sizes], defaults: Mapping[str, Sizes]
) -> dict[str, Sizes]:
    """Sizes of every dynamic dimension of ``inputs``.

    Raises ``InputError`` for a name that none of them has, and for one that has neither been given nor a default.
    """
    names = dimensions(inputs)
    for name in given:
        if name not in names:
            known = ", ".join(names) or "none, every size is fixed"
            raise InputError(f"no dimension '{name}'; dynamic dimensions of this graph: {known}")
    missing = [name for name in names if name not in given and name not in defaults]
    if missing:
        raise InputError(f"no sizes for dimension '{missing[0]}'; pass --profile {missing[0]}=MIN,OPT,MAX")
    return {name: given[name] if name in given else defaults[name] for name in names}


def shape_range(spec: TensorSpec, profile: Mapping[str, Sizes]) -> tuple[tuple[int, ...], ...]:
    """The smallest, tuned and largest shape of one input."""
    ranges = [_range(size, profile) for size in spec.shape]
    return tuple(tuple(sizes[which] for sizes in ranges) for which in range(3))


def check_profile(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec], profile: Mapping[str, Sizes]) -> None:
    """Raise ``RuntimeTargetError`` for a feed whose shape the engine was not built for."""
    for spec in inputs:
        if spec.name not in feeds:
            continue
        smallest, _, largest = shape_range(spec, profile)
        for axis, size in enumerate(feeds[spec.name].shape):
            if not smallest[axis] <= size <= largest[axis]:
                raise RuntimeTargetError(
                    f"input '{spec.name}' has {spec.shape[axis]} {size}, and the engine was built for "
                    f"{smallest[axis]} to {largest[axis]}; compile it again with --profile {spec.shape[axis]}=..."
                )


def _range(size: int | str, profile: Mapping[str, Sizes]) -> tuple[int, int, int]:
    if isinstance(size, int):
        return size, size, size
    parts = [
        (int(part),) * 3 if part.isdecimal() else (profile[part].minimum, profile[part].optimum, profile[part].maximum)
        for part in _terms(size)
    ]
    low, tuned, high = (sum(part[which] for part in parts) for which in range(3))
    return low, tuned, high


def _terms(size: str) -> list[str]:
    return [part.strip() for part in size.split("+")]
