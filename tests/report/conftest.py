"""A report as a demo writes one, by hand, with figures of a real run's size."""

from __future__ import annotations

import pytest

from deployfa.bench import BenchReport, Ceiling, ContenderReport, Result
from deployfa.bench.machine import Machine
from deployfa.bench.results import Settings
from deployfa.bundle.manifest import FusedCount
from deployfa.metrics import Scores
from deployfa.parity import ParityReport, Stage
from deployfa.report import DemoReport
from deployfa.report.demo_report import MethodResult, PlacementCount, Sentence


def method(name: str, parameters: int, seconds: float, *figures: float) -> MethodResult:
    rows = {"movies": 2000, "tweets": 3400, "amazon": 2900, "nyt": 3000}
    scores = {
        domain: Scores(rows=count, accuracy=figure + 0.006, balanced_accuracy=figure)
        for (domain, count), figure in zip(rows.items(), figures, strict=True)
    }
    return MethodResult(method=name, trainable_parameters=parameters, seconds=seconds, scores=scores)


def stage(name: str, noise_ratio: float, **change) -> Stage:
    usual = {
        "error": noise_ratio * 4.1e-7,
        "max_abs": 1.4e-6,
        "effect_error": 3.3e-7,
        "finite": True,
        "flips": 0,
        "flips_outside_noise": 0,
        "accuracy": 0.815,
        "mcnemar_p": 1.0,
        "passed": True,
    }
    return Stage(name=name, noise_ratio=noise_ratio, **{**usual, **change})


def parity(bundle: str, *ratios: float) -> ParityReport:
    names = ("PyTorch float32", "ONNX Runtime, optimisations off", "ONNX Runtime, as deployed")
    return ParityReport(
        bundle=f"build/demo/{bundle}",
        truth="PyTorch float64, adapter unfolded",
        rows=208,
        tokens_longest=53,
        noise=4.1e-7,
        noise_max_abs=1.6e-6,
        limit=2.0,
        effect=1.27,
        truth_accuracy=0.815,
        stages=[stage(name, ratio) for name, ratio in zip(names, ratios, strict=True)],
        passed=True,
        reason="every stage is within 2x the model's own float32 noise",
    )


def timing(contender: str, batch: int, p50_ms: float, *ratio: float, verdict: str, **change) -> Result:
    estimate, low, high = ratio or (1.0, None, None)
    usual = {
        "p90_ms": 1.05 * p50_ms,
        "p95_ms": 1.09 * p50_ms,
        "p99_ms": None,
        "refused": {"p99_ms": "p99 needs 662 samples, there are 312; measure for longer"},
    }
    return Result(
        contender=contender,
        batch=batch,
        sequence=128,
        spinning="off",
        samples=312,
        rounds=45,
        p50_ms=p50_ms,
        mean_ms=1.01 * p50_ms,
        min_ms=0.95 * p50_ms,
        items_per_s=1e3 * batch / (1.01 * p50_ms),
        ratio=estimate,
        ratio_low=low,
        ratio_high=high,
        verdict=verdict,
        flops=2_869_200_384 * batch,
        gflop_per_s=2.869200384 * batch / p50_ms * 1e3,
        **{**usual, **change},
    )


def contender(label: str, size_bytes: int) -> ContenderReport:
    return ContenderReport(
        label=label,
        kind="onnx",
        graph=f"{label}/model.onnx",
        bundle=None,
        size_bytes=size_bytes,
        peak_memory_bytes=214_000_000,
        start_ms=[101.0, 99.5, 104.0],
        import_ms=[88.0, 86.1, 91.2],
        session_ms=[151.0, 149.0, 163.0],
        first_inference_ms=[14.4, 14.1, 15.0],
    )


def ceiling(batch: int, p50_ms: float) -> Ceiling:
    m = 128 * batch
    return Ceiling(
        batch=batch, sequence=128, spinning="off", m=m, k=384, n=1536, samples=300, p50_ms=p50_ms,
        gflop_per_s=2 * m * 384 * 1536 / p50_ms / 1e6,
    )  # fmt: skip


@pytest.fixture
def report() -> DemoReport:
    bench = BenchReport(
        machine=Machine(
            cpu="Intel(R) Xeon(R) Processor @ 2.60GHz",
            cores=2,
            system="Linux-6.1-x86_64",
            python="3.11.2",
            load_1min=1.52,
            busy_share=0.31,
            versions={"numpy": "2.4.0", "onnxruntime": "1.32.0"},
        ),
        settings=Settings(
            threads=2,
            spinning=["off"],
            launches=3,
            min_samples=130,
            max_seconds_per_shape=30,
            block_ms=40,
            seed=0,
            vocabulary=30522,
        ),
        contenders=[contender("base", 90_900_000), contender("folded", 90_950_000), contender("side-op", 91_080_000)],
        results=[
            timing("base", 1, 9.86, verdict="reference"),
            timing("folded", 1, 9.88, 1.003, 0.991, 1.014, verdict="indistinguishable"),
            timing("side-op", 1, 10.31, 1.047, 1.031, 1.066, verdict="slower"),
            timing("base", 8, 67.9, verdict="reference"),
            timing("folded", 8, 67.2, 0.989, 0.979, 0.998, verdict="faster"),
            timing("side-op", 8, 69.8, 1.028, 1.012, 1.043, verdict="slower"),
        ],
        ceilings=[ceiling(1, 0.32), ceiling(8, 2.4)],
        warnings=["the load was 1.52 on 2 cores before the bench began; bench again on a quiet machine"],
    )
    return DemoReport(
        created="2026-11-24T10:30:00+00:00",
        model="minilm",
        seed=0,
        train_rows=3000,
        methods=[
            method("head", 770, 31.0, 0.654, 0.580, 0.587, 0.625),
            method("vefa", 21_506, 118.0, 0.801, 0.792, 0.794, 0.776),
            method("lora", 332_546, 131.0, 0.832, 0.780, 0.823, 0.789),
        ],
        bundles=[
            PlacementCount(
                bundle="folded", folded=36, side_ops=0, extra_flops_per_token=0, extra_bytes=0,
                graph_bytes=90_950_000, fusion="onnxscript",
            ),
            PlacementCount(
                bundle="side-op", folded=0, side_ops=36, extra_flops_per_token=20_736, extra_bytes=82_944,
                graph_bytes=91_080_000, fusion="ort",
                fusions={
                    "com.microsoft::BiasGelu": FusedCount(base=6, adapted=6),
                    "packed MatMul (2 in 1)": FusedCount(base=0, adapted=1),
                    "packed MatMul (3 in 1)": FusedCount(base=6, adapted=5),
                },
            ),
        ],
        parity={"folded": parity("folded", 1.0, 0.87, 0.93), "side-op": parity("side-op", 1.0, 0.91, 1.12)},
        bench=bench,
        sentence=Sentence(text="The plot is thin, but I left with a smile.", label="positive", score=0.981),
        stage_seconds={"fetch model": 2.1, "train head": 33.9, "train vefa": 121.0, "bench": 64.2, "run": 1.8},
        versions={"python": "3.11.2", "deployfa": "0.1.0", "onnxruntime": "1.32.0"},
    )  # fmt: skip
