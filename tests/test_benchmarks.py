"""The committed tables of benchmarks are made from the committed figures, and say so when one is missing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from many_adapters_table import TARGETS, draw, markdown

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads((RESULTS / "many_adapters.json").read_text(encoding="utf-8"))


def test_the_table_of_many_adapters_is_of_every_part(report: dict[str, Any]) -> None:
    assert set(report["parts"]) == set(TARGETS)
    assert (RESULTS / "many_adapters.md").read_text(encoding="utf-8") == markdown(report)


def test_a_changed_figure_changes_the_table_and_the_plot(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    result = next(each for each in other["parts"]["mixed"]["results"] if each["ratio_low"] is not None)
    result["ratio"] += 0.5
    result["ratio_high"] += 0.5
    assert markdown(other) != markdown(report)
    drawn = draw(report)
    assert drawn.startswith("<?xml") and "16 mixed, 16x32" in drawn and draw(other) != drawn


def test_the_table_of_serving_is_made_from_its_figures() -> None:
    import serving_table

    content = json.loads((RESULTS / "serving.json").read_text(encoding="utf-8"))
    assert set(content["parts"]) == set(serving_table.TARGETS)
    shown = (RESULTS / "serving.md").read_text(encoding="utf-8")
    assert shown == serving_table.markdown(content)
    content["parts"]["overhead"]["results"][0]["overhead_ms"] += 1.0
    assert shown != serving_table.markdown(content)
    (fleet,) = content["parts"]["fleet"]["results"]
    assert fleet["errors"] == fleet["wrong"] == 0 and fleet["adapters"] == 1000


def test_the_table_of_fusions_is_made_from_its_figures() -> None:
    import fusions

    folder = RESULTS
    content = json.loads((folder / "fusions.json").read_text(encoding="utf-8"))
    assert (folder / "fusions.md").read_text(encoding="utf-8") == fusions.markdown(content)
    assert {row["contender"] for row in content["results"]} == set(fusions.FUSIONS)
    content["results"][1]["p50_ms"] += 1.0
    assert (folder / "fusions.md").read_text(encoding="utf-8") != fusions.markdown(content)
