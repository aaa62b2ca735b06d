"""The tiny layout with every part that there is, and its base's row."""

from __future__ import annotations

import pytest

from deployfa.edits import Array
from deployfa.tables import Layout, base_row

from . import tiny


@pytest.fixture
def layout() -> Layout:
    return tiny.make_layout()


@pytest.fixture
def base(layout: Layout) -> dict[str, Array]:
    return base_row(layout, {tiny.HEAD: tiny.base_head()})
