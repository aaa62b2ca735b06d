"""Training throughput, on the CPU: the same code that times a GPU."""

from __future__ import annotations

import pytest
from gpu_training import METHODS, PRECISIONS, compare, fit_once, training_plan

from deployfa.data import Row
from deployfa.errors import StatisticsError
from deployfa.preprocess.sentences import SENTENCES

ROWS = [Row(text, ("negative", "positive")[number % 2]) for number, text in enumerate(SENTENCES[4:31])]


def test_methods_are_timed_block_by_block_and_what_fails_is_listed() -> None:
    import torch

    def run(method: str, precision: str):  # type: ignore[no-untyped-def]
        if method == "lora":
            # asked of a machine without a GPU
            return fit_once(method, precision, ROWS, device="cuda", batch_size=2)
        return fit_once(method, precision, ROWS, device="cpu", batch_size=2, warm=1, steps=1)

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which would train")
    plan = [each for each in training_plan(None, bf16=False) if each[1] == "fp32" or each[0] == "vefa"]
    results, refused = compare(plan, run, launches=1)
    full, vefa = results
    assert (full["method"], vefa["method"]) == ("full", "vefa") and full["trainable"] > 1000 * vefa["trainable"]
    # 27 rows are 13 whole batches, of which the clock saw the last 12
    assert full["blocks"] == vefa["blocks"] == 12 and full["samples_per_s"] > 0
    assert full["over_full"] is None and vefa["over_full_low"] <= vefa["over_full"] <= vefa["over_full_high"]
    assert {(row["method"], row["precision"]): row["reason"] for row in refused} == {
        ("vefa", "bf16"): "this GPU does not compute in bfloat16",
        ("lora", "fp32"): "no CUDA device is visible to PyTorch; use --device auto or cpu",
    }


def test_the_plan_of_training_drops_nobody() -> None:
    wanted = [(method, precision) for precision in PRECISIONS for method in METHODS]
    assert [each[:2] for each in training_plan(None, bf16=True)] == wanted
    assert {each[2] for each in training_plan("no torch", bf16=True)} == {"no torch"}
    assert {each[2] for each in training_plan(None, bf16=True)} == {None}


def test_too_few_rows_to_time_are_refused() -> None:
    with pytest.raises(StatisticsError, match="too few to time"):
        fit_once("vefa", "fp32", ROWS[:4], device="cpu", batch_size=2)
