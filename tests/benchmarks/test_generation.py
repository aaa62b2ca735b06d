"""The committed figures of generation are the table's, and of answers that were the same tokens."""

from __future__ import annotations

from pathlib import Path

import msgspec
from generation import markdown

from deployfa.generation.timing_report import GenerationBench

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_table_is_of_the_figures() -> None:
    report = msgspec.json.decode((RESULTS / "generation.json").read_bytes(), type=GenerationBench)
    assert (RESULTS / "generation.md").read_text(encoding="utf-8") == markdown(report)
    assert all(result.same_tokens for result in report.results)
    assert {result.batch for result in report.results} == {1, 4, 16}
