"""The committed table of refusals by chance is the one that its figures make."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from noise import STAGES, NoiseReport, markdown

from deployfa.parity.measures import LIMIT

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def reports() -> list[NoiseReport]:
    return msgspec.json.decode((RESULTS / "noise.json").read_bytes(), type=list[NoiseReport])


def test_the_table_is_of_the_figures(reports: list[NoiseReport]) -> None:
    assert (RESULTS / "noise.md").read_text(encoding="utf-8") == markdown(reports)


def test_a_farther_stage_makes_another_table(reports: list[NoiseReport]) -> None:
    first = reports[0].adapters[0]
    far = msgspec.structs.replace(
        first, stages=[2 * LIMIT * max(first.one_run, first.noise, first.stored)] * len(STAGES)
    )
    changed = msgspec.structs.replace(reports[0], adapters=[far, *reports[0].adapters[1:]])
    assert markdown([changed, *reports[1:]]) != markdown(reports)
