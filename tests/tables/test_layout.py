"""What a layout says of a row: names, shapes, bytes, places; and layouts that cannot be."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from deployfa.errors import InputError
from deployfa.tables import Head, Layout, LowRanks, Segment, Vectors
from deployfa.tables.checks import check_layout

from .tiny import make_layout


def segments(*bounds: tuple[str, int, int]) -> list[Segment]:
    return [Segment(site=site, start=start, stop=stop) for site, start, stop in bounds]


def test_the_shapes_are_those_of_one_row(layout: Layout) -> None:
    assert layout.shapes() == {
        "adapter/lambda": (13,),
        "adapter/delta": (13,),
        "adapter/out_lambda": (6,),
        # the A's of q and k, rank 3 each, lie side by side in the first one's name
        "adapter/q/A": (5, 6),
        "adapter/q/B": (3, 5),
        "adapter/k/B": (3, 5),
        "adapter/up/out_A": (8, 2),
        "adapter/up/out_B": (2, 3),
        "adapter/classifier/weight": (3, 4),
        "adapter/classifier/bias": (4,),
    }


def test_the_bytes_of_a_row_are_those_of_its_tensors(layout: Layout) -> None:
    assert layout.row_bytes == 4 * (13 + 13 + 6 + 30 + 15 + 15 + 16 + 6 + 12 + 4)
    assert make_layout(heads=[]).row_bytes == layout.row_bytes - 4 * 16


def test_each_site_has_the_parts_that_the_layout_gives_it(layout: Layout) -> None:
    assert layout.sites() == {
        "q": {"lambda", "A"},
        "k": {"delta", "out_lambda", "A"},
        "up": {"lambda", "delta", "A"},
        "classifier": {"weight"},
    }


def test_a_layout_survives_json(layout: Layout) -> None:
    again = msgspec.json.decode(msgspec.json.encode(layout), type=Layout)
    assert again == layout
    assert again.shapes() == layout.shapes()


def test_vectors_without_segments_are_empty() -> None:
    assert Vectors(part="lambda", segments=[]).width == 0


def test_a_sound_layout_passes(layout: Layout) -> None:
    check_layout(layout)
    check_layout(make_layout(vectors=[], low_ranks=[]))
    check_layout(make_layout(heads=[]))


def low(**changes: Any) -> list[LowRanks]:
    parts = {"where": "input", "sites": ["q", "k"], "in_features": 5, "rank": 3, "widths": [5, 5]}
    return [LowRanks(**(parts | changes))]


HUGE = 2**62


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vectors": [], "low_ranks": [], "heads": []}, "it has no tensors"),
        ({"vectors": [Vectors(part="lambda", segments=[])]}, "'adapter/lambda' has no sites"),
        ({"vectors": [Vectors(part="lambda", segments=segments(("q", 0, 5), ("up", 4, 12)))]}, "has 4:12 after 5"),
        ({"vectors": [Vectors(part="lambda", segments=segments(("q", 0, 5), ("up", 6, 14)))]}, "has 6:14 after 5"),
        ({"vectors": [Vectors(part="delta", segments=segments(("q", 1, 5)))]}, "has 1:5 after 0"),
        ({"vectors": [Vectors(part="delta", segments=segments(("q", 0, 0)))]}, "has 0:0 after 0"),
        ({"vectors": [Vectors(part="delta", segments=segments(("q", 0, -5)))]}, "has 0:-5 after 0"),
        ({"vectors": [Vectors(part="lambda", segments=segments(("q", 0, 5), ("q", 5, 10)))]}, "has a site twice"),
        ({"vectors": 2 * [Vectors(part="lambda", segments=segments(("q", 0, 5)))]}, "two of its tensors have one name"),
        ({"low_ranks": low(sites=[], widths=[])}, "0 sites and 0 widths"),
        ({"low_ranks": low(widths=[5])}, "2 sites and 1 widths"),
        ({"low_ranks": low(widths=[5, 0])}, "size below 1"),
        ({"low_ranks": low(rank=0)}, "size below 1"),
        ({"low_ranks": low(rank=-HUGE)}, "size below 1"),
        ({"low_ranks": low(in_features=-5)}, "size below 1"),
        ({"low_ranks": low(sites=["q", "q"])}, "two of its tensors have one name"),
        ({"low_ranks": low() + low()}, "two of its tensors have one name"),
        ({"heads": [Head(site="classifier", in_features=0, out_features=4)]}, "size below 1"),
        ({"heads": [Head(site="classifier", in_features=3, out_features=-1)]}, "size below 1"),
        ({"heads": 2 * [Head(site="classifier", in_features=3, out_features=4)]}, "two of its tensors have one name"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        check_layout(make_layout(**changes))
    text = str(caught.value)
    assert says in text and "; make it anew" in text and "\n" not in text


def test_no_size_is_computed_in_machine_integers() -> None:
    """What overflows 64 bits must not come out small."""
    huge = make_layout(low_ranks=low(in_features=HUGE, rank=HUGE))
    check_layout(huge)
    assert huge.row_bytes > 4 * HUGE * HUGE
    assert math.prod(huge.shapes()["adapter/q/A"]) == 2 * HUGE * HUGE
