"""Rows as edits: what a row does, and that making a row of it again gives the same bits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deployfa.tables import base_row, row_of
from deployfa.tables.row_edits import row_edits

from .tiny import HEAD, METHODS, base_head, make_adapter, make_layout

LAYOUT = make_layout()
BASE = base_row(LAYOUT, {HEAD: base_head()})


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_its_edits_is_that_row(method: str) -> None:
    adapter = make_adapter(method)
    row = row_of(adapter, LAYOUT, BASE)
    again = row_of(dataclasses.replace(adapter, edits=row_edits(row, LAYOUT)), LAYOUT, BASE)
    assert all(np.array_equal(row[name], again[name]) for name in row)
    other = row_of(make_adapter(method, 1), LAYOUT, BASE)
    assert any(not np.array_equal(other[name], again[name]) for name in row)


@pytest.mark.parametrize("method", METHODS)
def test_they_are_the_adapters_own(method: str) -> None:
    adapter = make_adapter(method)
    found = row_edits(row_of(adapter, LAYOUT, BASE), LAYOUT)
    assert set(found) == set(adapter.edits)
    for site, edit in adapter.edits.items():
        for mine, its in zip(
            (edit.lam, edit.delta, edit.output_scale),
            (found[site].lam, found[site].delta, found[site].output_scale),
            strict=True,
        ):
            assert (mine is None) == (its is None)
            assert mine is None or np.array_equal(mine, its)
        for low, its_low in (
            (edit.input_low_rank, found[site].input_low_rank),
            (edit.output_low_rank, found[site].output_low_rank),
        ):
            assert (low is None) == (its_low is None)
            if low is not None and its_low is not None:
                # s B is rounded once
                bound = 2.0**-24 * np.abs(low.s * low.b.astype(np.float64)) @ np.abs(low.a.astype(np.float64)) + 1e-12
                assert (np.abs(low.delta() - its_low.delta()) <= bound).all()


def test_the_bases_row_has_no_edits() -> None:
    assert row_edits(BASE, LAYOUT) == {}
