"""Rounds and ratios of ``benchmarks/gpu.py``, on contenders whose times are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gpu import ratios_of
from gpu_machine import parse_smi
from gpu_measure import COUNT, ROUNDS, alternate, summary
from gpu_plan import Planned


def way(gpu_ms: float, wall_ms: float, seed: int, *, dies_at: int = -1) -> Callable[[], tuple[float, float]]:
    random = np.random.default_rng(seed)
    calls = iter(range(1_000_000))

    def run() -> tuple[float, float]:
        if next(calls) == dies_at:
            raise RuntimeError("out of memory\nat 0x0")
        return gpu_ms * (1 + 0.01 * random.standard_normal()), wall_ms * (1 + 0.01 * random.standard_normal())

    return run


def test_ratios_hold_the_truth_by_either_clock_and_a_contender_that_fails_leaves() -> None:
    ways = {"eager": way(4, 8, 0), "folded": way(2, 7, 1), "slots": way(2.2, 7.7, 2), "dies": way(1, 1, 3, dies_at=40)}
    rounds = alternate(ways, samples=200, seconds=60, warm_s=0)
    assert rounds.failed == {"dies": "RuntimeError: out of memory"} and list(rounds.samples) == list(ways)[:3]
    assert {each.shape for each in rounds.samples.values()} == {(200 // COUNT, COUNT, 2)}
    references = {"eager": (None, None), "folded": ("eager", None), "slots": ("eager", "folded")}
    eager, folded, slots = summary(rounds.samples, references)
    assert eager["gpu_over_pytorch"] is None and folded["gpu_over_folded"] is None and folded["samples"] == 200
    for row, label, truth in (
        (folded, "gpu_over_pytorch", 0.5),
        (folded, "wall_over_pytorch", 7 / 8),
        (slots, "gpu_over_folded", 1.1),
        (slots, "wall_over_folded", 1.1),
    ):
        assert row[f"{label}_low"] < truth < row[f"{label}_high"]
        # 1 % of noise over 200 samples: far narrower than the ratios are apart
        assert row[f"{label}_high"] - row[f"{label}_low"] < 0.02
    assert eager["gpu_p50_ms"] == pytest.approx(4, rel=0.01) and eager["wall_p95_ms"] > eager["wall_p50_ms"]


def test_a_ratio_to_one_that_was_not_run_is_none_and_few_samples_carry_no_percentile() -> None:
    rounds = alternate({"one": way(1, 2, 0)}, samples=1, seconds=0, warm_s=0)
    (row,) = summary(rounds.samples, {"one": ("eager", "folded")})
    assert row["samples"] == ROUNDS * COUNT
    assert row["gpu_over_pytorch"] is None and row["wall_over_folded_high"] is None and row["gpu_p95_ms"] is None


def test_ratios_are_within_one_precision_and_one_system() -> None:
    assert ratios_of(Planned("PyTorch eager", "folded", "fp16")) == (None, None)
    assert ratios_of(Planned("TensorRT", "folded", "fp16")) == ("PyTorch eager, folded, fp16", None)
    assert ratios_of(Planned("TensorRT", "slots", "bf16")) == ("PyTorch eager, folded, bf16", "TensorRT, folded, bf16")


def test_what_a_gpu_does_not_tell_is_none() -> None:
    fields = ("name", "power.limit", "mig.mode.current")
    found = parse_smi(fields, "A card, 70.00 W, [N/A]")
    assert found == {"name": "A card", "power.limit": "70.00 W", "mig.mode.current": None}
    assert parse_smi(fields, "Field is not a valid field to query.") == {}
