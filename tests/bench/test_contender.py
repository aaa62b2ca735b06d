from __future__ import annotations

import pytest

from deployfa.bench import Contender, Shape
from deployfa.bench.contender import check_contenders
from deployfa.errors import InputError


@pytest.mark.parametrize(
    ("text", "shape"), [("8x128", Shape(8, 128)), (" 1 x 16 ", Shape(1, 16)), ("4×2", Shape(4, 2)), ("8", Shape(8, 1))]
)
def test_a_shape_is_parsed(text, shape):
    assert Shape.parse(text) == shape
    assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["", "x", "8x", "0x4", "8x0", "8x128x3", "-1x4", "8X128", "8,128"])
def test_what_is_not_a_shape(text):
    with pytest.raises(InputError, match="is not a shape; write BATCHxSEQUENCE"):
        Shape.parse(text)


def test_contenders_are_checked_before_anything_starts(tmp_path):
    graph = tmp_path / "a.onnx"
    graph.touch()
    check_contenders([Contender("a", graph=graph), Contender("b", kind="torch", adapter=graph)])
    wrong = {
        "nothing to bench": [],
        "two contenders are called 'a'": [Contender("a", graph=graph)] * 2,
        "has no graph at 'None'": [Contender("a")],
        "has no graph at '.*absent'": [Contender("a", graph=tmp_path / "absent")],
        "runs in PyTorch and has no adapter": [Contender("a", kind="torch")],
        "has no adapter at": [Contender("a", kind="torch", adapter=tmp_path / "absent")],
    }
    for message, contenders in wrong.items():
        with pytest.raises(InputError, match=message):
            check_contenders(contenders)
