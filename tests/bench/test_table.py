"""The tables say what the report says, and a refused figure is a dash with its footnote."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from deployfa.bench.machine import Machine
from deployfa.bench.results import BenchReport, Ceiling, ContenderReport, Result, Settings
from deployfa.bench.table import render


def result(**change) -> Result:
    usual = {
        "contender": "folded",
        "batch": 8,
        "sequence": 128,
        "spinning": "off",
        "samples": 200,
        "rounds": 30,
        "p50_ms": 58.64,
        "p90_ms": 61.2,
        "p95_ms": 62.9,
        "p99_ms": None,
        "mean_ms": 59.0,
        "min_ms": 55.0,
        "items_per_s": 135.6,
        "ratio": 1.0,
        "ratio_low": None,
        "ratio_high": None,
        "verdict": "reference",
        "flops": 22_953_603_072,
        "gflop_per_s": 391.4,
        "refused": {"p99_ms": "p99 needs 662 samples, there are 200; measure for longer"},
    }
    return Result(**{**usual, **change})


def contender(label: str) -> ContenderReport:
    return ContenderReport(
        label=label,
        kind="onnx",
        graph="model.onnx",
        bundle=None,
        size_bytes=90_900_000,
        peak_memory_bytes=204_000_000,
        start_ms=[100.0],
        import_ms=[20.0],
        session_ms=[110.0, 150.0],
        first_inference_ms=[5.25],
    )


@pytest.fixture
def report() -> BenchReport:
    machine = Machine(
        cpu="Some CPU", cores=2, system="Linux", python="3.11", load_1min=1.5, busy_share=0.0, versions={"numpy": "2.4"}
    )
    settings = Settings(
        threads=2,
        spinning=["off"],
        launches=3,
        min_samples=130,
        max_seconds_per_shape=60,
        block_ms=40,
        seed=0,
        vocabulary=1000,
    )
    other = {"contender": "side op", "ratio": 1.042, "ratio_low": 1.021, "ratio_high": 1.066, "verdict": "slower"}
    unknown = {"flops": None, "gflop_per_s": None, "refused": {"flops": "no rule for a Einsum"}}
    return BenchReport(
        machine=machine,
        settings=settings,
        contenders=[contender("folded"), contender("side op")],
        results=[result(), result(**other, **unknown, p99_ms=70.0)],
        ceilings=[
            Ceiling(
                batch=8, sequence=128, spinning="off", m=1024, k=384, n=1536, samples=200, p50_ms=2.4, gflop_per_s=503.2
            )
        ],
        warnings=["the load was 1.5"],
    )


def shown(report: BenchReport) -> str:
    console = Console(width=260, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(report))
    console.file.close()
    return console.export_text()


def rows(text: str, label: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in text.splitlines() if "│" in line]
    return [line for line in lines if label in line]


def test_latency_rows(report):
    text = shown(report)
    reference, other = rows(text, "folded")[0], rows(text, "side op")[0]
    assert reference[:8] == ["8x128", "folded", "58.6", "61.2", "62.9", "–", "1", "reference"]
    assert reference[8:] == ["136", "391", "204", "90.9", "200"]
    assert other[6:8] == ["1.042 [1.021, 1.066]", "slower"]
    assert other[5] == "70.0" and other[9] == "–"
    (bare,) = rows(text, "bare MatMul (1024, 384) (384, 1536)")
    assert bare[2] == "2.40" and bare[9] == "503"


def test_units_footnotes_and_warnings(report):
    text = shown(report)
    for unit in ("p50 (ms)", "ratio [95 % interval]", "throughput (items/s)", "memory (MB)", "size (MB)"):
        assert unit in text
    assert "Latency, 2 threads, spinning off" in text
    assert "– too few samples: p99 needs 662" in text
    assert "– side op, flops: no rule for a Einsum" in text
    assert "warning: the load was 1.5" in text
    assert "Some CPU, 2 cores, load 1.50 before" in text
    assert rows(text, "folded")[1][1:] == ["100 to 100", "20.0 to 20.0", "110 to 150", "5.25 to 5.25"]


def test_no_footnote_when_nothing_was_refused(report):
    full = [msgspec.structs.replace(each, p99_ms=70.0, refused={}) for each in report.results]
    text = shown(msgspec.structs.replace(report, results=full))
    assert "too few samples" not in text


def test_each_setting_of_spinning_has_its_own_table(report):
    settings = msgspec.structs.replace(report.settings, spinning=["off", "on"])
    results = [*report.results, result(spinning="on", p50_ms=44.0)]
    text = shown(msgspec.structs.replace(report, settings=settings, results=results))
    assert text.index("spinning off") < text.index("58.6") < text.index("spinning on") < text.index("44.0")
