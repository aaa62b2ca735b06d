"""Real benches of small graphs.  Structure and large margins are asserted, never a latency."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import msgspec
import numpy as np
import psutil
import pytest

from deployfa.bench import BenchReport, Contender, Shape, bench
from deployfa.errors import InputError, OutputExistsError, RuntimeTargetError

SHAPES = [Shape(1, 8), Shape(2, 16)]


@pytest.fixture(scope="module")
def measured(make_graph, tmp_path_factory):
    """A against itself, against ten times the work, and against a graph whose work cannot be counted."""
    graph, heavy = make_graph(layers=4, width=128), make_graph(layers=60, width=128)
    samples = tmp_path_factory.mktemp("bench") / "samples.json"
    shares = []
    report = bench(
        [Contender("A", graph=graph), Contender("A again", graph=graph), Contender("heavy", graph=heavy)],
        SHAPES,
        threads=1,
        launches=3,
        min_samples=64,
        block_ms=5,
        progress=lambda doing, share: shares.append((doing, share)),
        samples_out=samples,
    )
    return report, json.loads(samples.read_bytes()), shares


def test_every_contender_at_every_shape(measured):
    report, _, _ = measured
    found = [(result.batch, result.sequence, result.contender) for result in report.results]
    assert found == [(shape.batch, shape.sequence, label) for shape in SHAPES for label in ("A", "A again", "heavy")]
    for result in report.results:
        assert 64 <= result.samples < 130 and result.rounds >= 9
        assert 0 < result.min_ms <= result.p50_ms <= result.p90_ms
        assert result.p95_ms is None and result.p99_ms is None
        assert "p95 needs 130 samples" in result.refused["p95_ms"]
        assert "p99 needs 662 samples" in result.refused["p99_ms"]
        assert result.items_per_s == pytest.approx(1e3 * result.batch / result.mean_ms)
        assert result.gflop_per_s == pytest.approx(result.flops / (result.p50_ms * 1e6))


def test_ratios_are_to_the_first(measured):
    report, _, _ = measured
    for index in range(0, len(report.results), 3):
        first, again, heavy = report.results[index : index + 3]
        assert (first.ratio, first.ratio_low, first.verdict) == (1.0, None, "reference")
        assert again.ratio_low <= again.ratio <= again.ratio_high
        assert heavy.verdict == "slower" and heavy.ratio_low > 2
        assert heavy.flops == 15 * first.flops == 15 * 4 * 2 * first.batch * first.sequence * 128 * 128


def test_swapping_the_reference_turns_the_verdict_round(make_graph):
    heavy, light = make_graph(layers=150, width=128), make_graph(layers=5, width=128)
    report = bench(
        [Contender("heavy", graph=heavy), Contender("light", graph=light)],
        [Shape(2, 16)],
        threads=1,
        min_samples=30,
        flops=False,
        bare_matmul=False,
    )
    assert report.results[1].verdict == "faster" and report.results[1].ratio_high < 0.5
    assert report.ceilings == [] and report.results[0].flops is None and report.results[0].gflop_per_s is None


def test_cold_start_memory_and_size_are_kept_apart(measured):
    report, _, _ = measured
    for each in report.contenders:
        for figures in (each.start_ms, each.import_ms, each.session_ms, each.first_inference_ms):
            assert len(figures) == 3 and min(figures) > 0
        assert 10e6 < each.peak_memory_bytes < 2e9
    size = {each.label: each.size_bytes for each in report.contenders}
    assert size["A"] == size["A again"] < size["heavy"]


def test_the_ceiling_is_measured_in_the_same_run(measured):
    report, samples, _ = measured
    assert [(each.m, each.k, each.n) for each in report.ceilings] == [(8, 384, 1536), (32, 384, 1536)]
    for each in report.ceilings:
        assert each.gflop_per_s == pytest.approx(2 * each.m * each.k * each.n / (each.p50_ms * 1e6))
    assert {entry["contender"] for entry in samples["samples"]} == {"A", "A again", "heavy", "bare MatMul"}


def test_the_raw_samples_are_those_of_the_report(measured):
    report, samples, _ = measured
    assert samples["format"] == "deployfa-bench-samples/1"
    for result in report.results:
        wanted = (result.contender, result.batch, result.sequence, result.spinning)
        entries = [
            entry
            for entry in samples["samples"]
            if (entry["contender"], entry["batch"], entry["sequence"], entry["spinning"]) == wanted
        ]
        assert [entry["launch"] for entry in entries] == [0, 1, 2]
        values = np.concatenate([np.ravel(entry["rounds_ms"]) for entry in entries])
        assert values.size == result.samples
        assert np.median(values) == pytest.approx(result.p50_ms)
        assert values.min() == result.min_ms
        assert sum(len(entry["rounds_ms"]) for entry in entries) == result.rounds


def test_the_report_says_what_it_was_measured_on(measured):
    report, _, _ = measured
    assert report.machine.cores >= 1 and report.machine.cpu and report.machine.python == sys.version.split()[0]
    assert {"numpy", "onnxruntime"} <= set(report.machine.versions)
    assert (report.settings.threads, report.settings.spinning, report.settings.launches) == (1, ["off"], 3)


def test_the_report_obeys_its_schema_and_survives_the_way_to_json(measured):
    report, _, _ = measured
    content = msgspec.json.encode(report)
    assert msgspec.json.decode(content, type=BenchReport) == report
    schema = msgspec.json.schema(BenchReport)
    jsonschema.validate(json.loads(content), schema)
    broken = json.loads(content)
    broken["results"][0]["verdict"] = "quite fast"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_progress_goes_up_to_one(measured):
    _, _, shares = measured
    assert [share for _, share in shares] == sorted(share for _, share in shares)
    assert shares[-1][1] == 1.0 and "1x8, spinning off, launch 1 of 3" in shares[0][0]


def test_both_settings_of_spinning_are_reported_apart_and_one_launch_gives_no_verdict(make_graph):
    graph = make_graph()
    report = bench(
        [Contender("A", graph=graph), Contender("B", graph=graph)],
        [Shape(1, 4)],
        threads=1,
        launches=1,
        spinning="both",
        min_samples=11,
        flops=False,
        bare_matmul=False,
    )
    assert [(result.spinning, result.contender) for result in report.results] == [
        ("off", "A"),
        ("off", "B"),
        ("on", "A"),
        ("on", "B"),
    ]
    for result in report.results[1::2]:
        assert result.ratio is not None and result.verdict is None
        assert "pass 2 or more launches" in result.refused["verdict"]


def test_too_little_time_is_said_and_the_figures_are_refused(make_graph):
    report = bench(
        [Contender("A", graph=make_graph(layers=150, width=128))],
        [Shape(4, 32)],
        threads=1,
        launches=1,
        min_samples=5000,
        max_seconds_per_shape=0.05,
        block_ms=0.1,
        flops=False,
        bare_matmul=False,
    )
    (result,) = report.results
    assert result.samples < 5000 and result.p99_ms is None
    assert any(f"time ran out with {result.samples} of 5000 samples" in warning for warning in report.warnings)


def test_a_contender_that_cannot_run_stops_the_bench_and_leaves_nothing(make_graph, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(make_graph().read_bytes()[:100])
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RuntimeTargetError, match="contender 'broken': onnxruntime does not load"):
        bench(
            [Contender("A", graph=make_graph()), Contender("broken", graph=broken)],
            [Shape(1, 4)],
            samples_out=tmp_path / "samples.json",
            flops=False,
        )
    assert set(psutil.Process().children(recursive=True)) == before
    assert not (tmp_path / "samples.json").exists()


def test_wrong_arguments_are_refused_before_anything_is_measured(make_graph, tmp_path):
    contenders = [Contender("A", graph=make_graph())]
    there = tmp_path / "samples.json"
    there.touch()
    with pytest.raises(OutputExistsError):
        bench(contenders, SHAPES, samples_out=there)
    wrong = {
        "no shape": {"shapes": []},
        "spinning is 'maybe'": {"spinning": "maybe"},
        "threads is 0": {"threads": 0},
        "launches is 0": {"launches": 0},
        "min_samples is 0": {"min_samples": 0},
        "block_ms is -1": {"block_ms": -1},
        "is taken by the ceiling": {"contenders": [Contender("bare MatMul", graph=make_graph())]},
    }
    for message, change in wrong.items():
        with pytest.raises(InputError, match=message):
            bench(**{"contenders": contenders, "shapes": SHAPES, **change})


def test_the_parent_imports_no_runtime(make_graph):
    code = (
        "import sys\nfrom pathlib import Path\nfrom deployfa.bench import Contender, Shape, bench\n"
        "graph = Path(sys.argv[1])\n"
        "bench([Contender('A', graph=graph)], [Shape(1, 4)], threads=1, launches=1, min_samples=11)\n"
        "print(sorted({'torch', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(make_graph())], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
