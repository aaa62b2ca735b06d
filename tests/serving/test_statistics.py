"""Counts of requests, rows and batches are three things."""

from __future__ import annotations

from deployfa.serving.statistics import ModelStatistics
from deployfa.serving.work import Answered


def test_three_requests_of_one_batch_are_three() -> None:
    statistics = ModelStatistics()
    statistics.ran(6, 0.001, 0.01, 0.002)
    for rows in (1, 2, 3):
        statistics.answered(Answered({}, 0.1, 0.01, 6, 0.0, 0.001), rows, total_s=0.2, output_s=0.003)
    statistics.failed(0.5)
    told = statistics.shown("m", "1")
    assert (told["inference_count"], told["execution_count"]) == (6, 1)
    counted = {name: (each["count"], each["ns"] / 1e9) for name, each in told["inference_stats"].items()}
    wanted = {
        "success": (3, 0.6),
        "fail": (1, 0.5),
        "queue": (3, 0.3),
        "compute_input": (3, 0.003),
        "compute_infer": (3, 0.03),
        "compute_output": (3, 0.009),
        "cache_hit": (0, 0),
        "cache_miss": (0, 0),
    }
    assert {name: (count, round(seconds, 6)) for name, (count, seconds) in counted.items()} == wanted
    (batch,) = told["batch_stats"]
    assert batch["batch_size"] == 6 and batch["compute_infer"] == {"count": 1, "ns": 10_000_000}
