"""What a layout, a row and a name must be before anything is built on them; a file from a stranger may say anything."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deployfa.edits import Array
from deployfa.errors import EditError, InputError
from deployfa.tables.layout import Layout

__all__ = ["BASE", "bad_row", "check_base", "check_layout", "check_name", "check_row", "padded"]

#: What row 0 is called.
BASE = "base"


def check_name(name: str) -> None:
    """Raise ``InputError`` unless ``name`` can name an adapter: printable text that is not the base's name."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise InputError(f"{name!r} cannot name an adapter; pass a text of printable characters")
    if name == BASE:
        raise InputError(f"'{BASE}' is row 0, the model without an adapter; pass another name")


def check_layout(layout: Layout) -> None:
    """Raise ``InputError`` unless the layout describes tensors that can be: sizes from 1 on, no name twice."""
    for vectors in layout.vectors:
        stop = 0
        for segment in vectors.segments:
            if segment.start != stop or segment.stop <= segment.start:
                raise _unsound(f"'{vectors.name}' has {segment.start}:{segment.stop} after {stop}")
            stop = segment.stop
        sites = [segment.site for segment in vectors.segments]
        if not sites or len(set(sites)) != len(sites):
            raise _unsound(f"'{vectors.name}' has {'a site twice' if sites else 'no sites'}")
    for low in layout.low_ranks:
        if not low.sites or len(low.sites) != len(low.widths):
            raise _unsound(f"a low rank has {len(low.sites)} sites and {len(low.widths)} widths")
        if min(low.in_features, low.rank, *low.widths) < 1:
            raise _unsound(f"the low rank of '{low.sites[0]}' has a size below 1")
    for head in layout.heads:
        if min(head.in_features, head.out_features) < 1:
            raise _unsound(f"the head '{head.site}' has a size below 1")
    tensors = len(layout.vectors) + sum(1 + len(low.sites) for low in layout.low_ranks) + 2 * len(layout.heads)
    if not tensors:
        raise _unsound("it has no tensors")
    if len(layout.shapes()) != tensors:
        raise _unsound("two of its tensors have one name")


def check_row(layout: Layout, row: Mapping[str, Array]) -> None:
    """Raise ``EditError`` unless ``row`` has the layout's tensors: shapes, float32, finite but for masked labels."""
    shapes = layout.shapes()
    if row.keys() != shapes.keys():
        odd = min(row.keys() ^ shapes.keys())
        raise EditError(f"a row {'lacks' if odd in shapes else 'has'} '{odd}'; make rows with row_of for this layout")
    masked = padded(layout)
    for name, shape in shapes.items():
        array = row[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise EditError(
                f"'{name}' is {array.dtype} {array.shape} in a row, float32 {shape} in the layout; make rows with "
                "row_of for this layout"
            )
        if bad_row(array[None], padded=name in masked) is not None:
            raise EditError(f"'{name}' holds NaN or infinity; nothing was written")


def check_base(layout: Layout, row: Mapping[str, Array]) -> None:
    """Raise ``EditError`` unless ``row`` leaves the base as it is: zeros everywhere but in the heads."""
    check_row(layout, row)
    heads = {name for head in layout.heads for name in (head.weight_name, head.bias_name)}
    for name, array in row.items():
        if name not in heads and array.any():
            raise EditError(f"'{name}' of the base's row is not zero; make it with base_row")


def padded(layout: Layout) -> set[str]:
    """The tensors that hold minus infinity where an adapter has fewer labels than there is room for."""
    return {head.bias_name for head in layout.heads}


def bad_row(block: Array, *, padded: bool) -> int | None:
    """The first row of ``block``, (n, *shape), with a number that is not finite; None if there is none.

    ``padded``: minus infinity may follow finite numbers, of which there is at least one.
    """
    finite = np.isfinite(block)
    if finite.all():
        return None
    finite = finite.reshape(len(block), -1)
    good = np.asarray(finite.all(axis=1))
    if padded:
        masked = np.isneginf(block)
        good = (finite | masked).all(axis=1) & finite[:, 0] & (masked[:, 1:] >= masked[:, :-1]).all(axis=1)
    return None if good.all() else int(np.argmin(good))


def _unsound(what: str) -> InputError:
    return InputError(f"the layout makes no sense: {what}; make it anew with this version of deployfa")
