"""The committed table of the three tasks is the one that its figures make."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tasks import FORMS, TASKS, TaskReport, markdown

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def reports() -> dict[str, TaskReport]:
    return msgspec.json.decode((RESULTS / "tasks.json").read_bytes(), type=dict[str, TaskReport])


def test_the_table_is_of_the_figures(reports: dict[str, TaskReport]) -> None:
    assert (RESULTS / "tasks.md").read_text(encoding="utf-8") == markdown(reports)


def test_all_tasks_in_all_forms(reports: dict[str, TaskReport]) -> None:
    assert list(reports) == list(TASKS)
    for report in reports.values():
        assert {row.form for row in report.rows} == set(FORMS)
        assert all(row.passed and row.noise_ratio is not None and row.noise_ratio <= 2 for row in report.rows)


def test_another_figure_makes_another_table(reports: dict[str, TaskReport]) -> None:
    name, report = next(iter(reports.items()))
    row = msgspec.structs.replace(report.rows[0], p50_ms=report.rows[0].p50_ms + 1)
    changed = msgspec.structs.replace(report, rows=[row, *report.rows[1:]])
    assert markdown({**reports, name: changed}) != markdown(reports)
