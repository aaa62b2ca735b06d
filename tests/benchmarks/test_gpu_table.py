"""The tables of ``benchmarks/gpu.py``: nothing that was measured, or not run, is left out of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_measure import summary
from gpu_table import markdown

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report() -> dict[str, Any]:
    """The shape of a report; its times are made up, and no GPU's."""
    random = np.random.default_rng(0)
    samples = {name: random.uniform(1, 2, (20, 5, 2)) for name in ("eager", "engine")}
    rows = summary(samples, {"eager": (None, None), "engine": ("eager", None)})
    named = {"form": "folded", "precision": "fp32", "batch": 8, "sequence": 128, "error": 1e-7, "error_limit": 4e-7}
    results = [{**row, **named, "system": row.pop("contender")} for row in rows]
    not_run = [
        {"system": "A", "form": "slots", "precision": "bf16", "batch": None, "sequence": None, "reason": "not | here"},
        {"system": "B", "form": "mixed", "precision": "fp16", "batch": 1, "sequence": 16, "reason": "out of memory"},
        {"system": "C", "form": "mixed", "precision": "fp16", "batch": 1, "sequence": 16, "reason": "out of memory"},
    ]
    gpu = {"name": "No such card", "compute_capability": "0.0", "memory_bytes": 2**33, "driver": None, "before": {}}
    machine = {"gpu": gpu, "cpu": "a CPU", "cores": 2, "versions": {"numpy": "2"}}
    trained = {"method": "vefa", "precision": "bf16", "launches": 1, "samples_per_s": 12.0, "trainable": 21506}
    trained |= {"peak_bytes": None, "over_full": 1.25, "over_full_low": 1.125, "over_full_high": 1.5}
    training = {"machine": machine, "batch_size": 32, "rows": 3000, "results": [trained]}
    training["not_run"] = [{"method": "lora", "precision": "fp32", "reason": "no memory"}]
    inference = {"machine": machine, "method": "vefa", "results": results, "not_run": not_run}
    return {"parts": {"inference": inference, "training": training}}


def test_every_result_and_every_reason_is_in_the_table(report: dict[str, Any]) -> None:
    text = markdown(report)
    assert "No such card (compute capability 0.0, 8 GiB)" in text and "### fp32, 8x128" in text
    for row in report["parts"]["inference"]["results"]:
        assert f"| {row['system']} | folded | {row['gpu_p50_ms']:.3f} | {row['wall_p50_ms']:.3f} |" in text
    assert "| A, slots, bf16 | not \\| here |" in text
    assert "| B, mixed, fp16, 1x16; C, mixed, fp16, 1x16 | out of memory |" in text
    assert (
        "| vefa | bf16 | 21,506 | 12 | 1.250 [1.125, 1.500] | – | 1 |" in text and "| lora, fp32 | no memory |" in text
    )
    assert markdown({"parts": {}}) == "# On a GPU\n"


def test_a_changed_figure_changes_the_table(report: dict[str, Any]) -> None:
    for change in ("gpu_p50_ms", "wall_p50_ms", "gpu_over_pytorch_high", "error"):
        other = copy.deepcopy(report)
        other["parts"]["inference"]["results"][1][change] += 0.5
        assert markdown(other) != markdown(report)


def test_what_is_committed_is_of_a_gpu_or_said_to_be_not_run() -> None:
    file, readme = BENCHMARKS / "results" / "gpu.json", (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    if file.is_file():
        report = json.loads(file.read_text(encoding="utf-8"))
        assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown(report)
        assert report["parts"]["inference"]["machine"]["gpu"]["name"] in readme
    else:
        assert not file.with_suffix(".md").exists()
        assert "`python benchmarks/gpu.py --out benchmarks/results` | not run: no GPU was at hand |" in readme
