"""Everything of ``benchmarks/gpu.py`` that needs no GPU, run for real; and, where there is one, all of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu import held, one_shape, open_all, pytorch_errors
from gpu_contenders import OrtSession, TorchModel, compiled, per_adapter
from gpu_forms import ADAPTER_IDS, Form, Graph, build_engine, feeds_of, make_forms, pytorch_model, typed_graph
from gpu_plan import FORMS, PRECISIONS, SYSTEMS, Planned, make_plan, probe_all, what_is_missing
from gpu_reference import batches, limit_of, rows_of
from many_adapters import adapters, text_feeds

from deployfa.adapter import Adapter
from deployfa.bench import Shape
from deployfa.bundle.slots import idle_row
from deployfa.data import Row
from deployfa.edits import Array, Edit
from deployfa.errors import RuntimeTargetError
from deployfa.parity.measures import LIMIT, normwise
from deployfa.preprocess.sentences import SENTENCES
from deployfa.runtimes.probe import DEVICES, Found, probe

ROOT = Path(__file__).parents[2]
SHAPE = Shape(3, 32)


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def devices() -> Found:
    return probe(DEVICES)


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> Form:
    """A batch of rows of two adapters."""
    rows = [Row(text) for text in SENTENCES[4:20]]
    return make_forms(tmp_path_factory.mktemp("forms"), "vefa", forms=["mixed"], distinct=2, rows=rows)["mixed"]


@pytest.fixture(scope="module")
def graph(form: Form, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return typed_graph(form, "fp32", tmp_path_factory.mktemp("graph") / "plain")


def test_without_a_gpu_it_says_what_is_missing_and_writes_nothing(devices: Found, tmp_path: Path) -> None:
    if devices.ok:
        pytest.skip("there is a GPU")
    out = tmp_path / "results"
    done = run(out)
    assert done.returncode == 2 and done.stdout == "" and not out.exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: nothing was measured: no NVIDIA GPU found (")
    assert line.endswith("run this on a machine with an NVIDIA GPU and its driver")
    assert what_is_missing(devices) in line


def test_with_a_gpu_and_its_clock_nothing_is_missing() -> None:
    assert what_is_missing(Found(ok=True)) is None
    assert "no card" in (what_is_missing(Found(ok=False, reason="no card")) or "")


@pytest.mark.gpu
@pytest.mark.slow
def test_all_of_it_on_a_gpu(devices: Found, tmp_path: Path) -> None:
    if not devices.ok:
        pytest.skip(devices.reason or "no GPU")
    few = ("--samples=15", "--seconds=30", "--warm=0", "--precision=fp32", "--train-rows=800", "--launches=1")
    done = run(tmp_path, *few)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    inference = report["parts"]["inference"]
    assert inference["machine"]["gpu"]["name"] == devices.devices[0].name
    assert inference["results"] or inference["not_run"]
    assert all(row["gpu_p50_ms"] > 0 and row["error"] <= row["error_limit"] for row in inference["results"])
    # whatever is planned is in the one list or in the other
    ran = {(row["system"], row["form"]) for row in (*inference["results"], *inference["not_run"])}
    assert ran == {(system, form) for system in SYSTEMS for form in FORMS}
    assert (tmp_path / "gpu.md").read_text().startswith("# On a GPU")


def test_the_plan_drops_nobody_and_says_why_each_does_not_run() -> None:
    found = probe_all()
    plan = make_plan(found)
    wanted = {(system, form, precision) for system in SYSTEMS for form in FORMS for precision in PRECISIONS}
    assert {(each.system, each.form, each.precision) for each in plan} == wanted and len(plan) == len(wanted)
    for each in plan:
        assert each.why_not is None or each.why_not.strip()
    if not found["onnxruntime-cuda"].ok:
        (one,) = [each for each in plan if each.label == "ONNX Runtime CUDA, folded, fp32"]
        assert one.why_not == found["onnxruntime-cuda"].reason
    # it builds engines here, so it is planned until it is opened
    library = found["library:tensorrt-rtx"]
    (one,) = [each for each in plan if each.label == "TensorRT-RTX, mixed, fp32"]
    assert (one.why_not is None) == library.ok
    better = {name: Found(ok=True) for name in found}
    (one,) = [each for each in make_plan(better) if each.label == "ONNX Runtime CUDA, folded, fp32"]
    assert one.why_not is None


def test_what_does_not_open_is_listed_with_what_it_answered(graph: Graph) -> None:
    plan = [
        Planned("ONNX Runtime CUDA", "mixed", "fp32"),
        Planned("TensorRT", "mixed", "fp32", "not here"),
        Planned("PyTorch eager", "mixed", "fp32"),
    ]

    def opened(planned: Planned) -> Any:
        if planned.kind == "torch":
            raise MemoryError("2 GB\nand more")
        return OrtSession("onnxruntime-cpu", graph, None)

    running, refused = open_all(plan, opened)
    assert list(running) == plan[:1]
    assert [(row["system"], row["reason"]) for row in refused] == [
        ("TensorRT", "not here"),
        ("PyTorch eager", "MemoryError: 2 GB"),
    ]
    if not probe("onnxruntime-cuda").ok:
        _, refused = open_all(plan[:1], lambda planned: OrtSession(planned.target, graph, None))
        assert "CUDAExecutionProvider" in refused[0]["reason"]


def test_rows_are_padded_and_batched_without_losing_any(form: Form) -> None:
    rows = rows_of(form.bundle)
    assert len(rows) == 16
    asked = batches(rows, SHAPE)
    assert all(feeds["input_ids"].shape == (3, 32) and feeds[ADAPTER_IDS].shape == (3,) for feeds in asked.feeds)
    assert [number for chunk in asked.rows for number in chunk] == list(range(16))
    shortest = min(row.feeds["input_ids"].shape[1] for row in rows)
    assert 0 < len(batches(rows, Shape(1, shortest)).truth) < 16
    with pytest.raises(AssertionError, match="as short as"):
        batches(rows, Shape(1, shortest - 1))


def test_a_session_answers_and_launches_the_same_and_what_is_wrong_is_seen(form: Form, graph: Graph) -> None:
    session = OrtSession("onnxruntime-cpu", graph, None)
    planned = Planned("ONNX Runtime CUDA", "mixed", "fp32")
    asked = batches(rows_of(form.bundle), SHAPE)
    of_pytorch = pytorch_errors({"mixed": form}, "fp32")(form, asked)
    noise = form.bundle.manifest.reference.noise
    # rows one adapter after the other in PyTorch: the float32 noise and no more
    assert 0 < of_pytorch <= LIMIT * noise
    figures, why = held(planned, session, form, asked, of_pytorch)
    assert why is None and 0 < figures["error"] <= figures["error_limit"] == LIMIT * max(of_pytorch, noise)
    feeds = feeds_of(form, text_feeds(SHAPE.batch, SHAPE.sequence))
    assert feeds[ADAPTER_IDS].tolist() == [1, 2, 1]
    session.upload(feeds)
    session.launch()
    np.testing.assert_array_equal(session.launched, session.answer(feeds))
    swapped = [{**each, ADAPTER_IDS: 3 - each[ADAPTER_IDS]} for each in asked.feeds]
    for wrong in (
        dataclasses.replace(asked, feeds=swapped),
        dataclasses.replace(asked, truth=asked.truth[::-1]),
    ):
        figures, why = held(planned, session, form, wrong, of_pytorch)
        assert not figures and why is not None and "differ from the float64 reference" in why
    dead = dataclasses.replace(graph, bound={**graph.bound, "adapter/lambda": 0 * graph.bound["adapter/lambda"]})
    assert held(planned, OrtSession("onnxruntime-cpu", dead, None), form, asked, of_pytorch)[1] is not None
    assert asked.error(lambda feeds: np.full((3, 2), np.nan)) == float("inf")


def test_at_a_shape_the_right_are_timed_and_the_wrong_are_listed(form: Form, graph: Graph) -> None:
    right, dead, fails = (Planned(system, "mixed", "fp32") for system in list(SYSTEMS)[3:6])
    silent = dataclasses.replace(graph, bound={**graph.bound, "adapter/lambda": 0 * graph.bound["adapter/lambda"]})
    running = {
        right: OrtSession("onnxruntime-cpu", graph, None),
        dead: OrtSession("onnxruntime-cpu", silent, None),
        fails: OrtSession("onnxruntime-cpu", graph, None),
    }
    launches = 0

    def timed(one: Any) -> float:
        nonlocal launches
        launches += 1
        if one is running[fails] and launches > 20:
            raise MemoryError("no more")
        begin = time.perf_counter()
        one.launch()
        return 1e3 * (time.perf_counter() - begin)

    options = argparse.Namespace(samples=15, seconds=60.0, warm=0.0)
    forms = {"mixed": form}
    found, refused = one_shape(list(running), running, forms, SHAPE, timed, pytorch_errors(forms, "fp32"), options)
    (row,) = found
    assert (row["system"], row["batch"], row["sequence"], row["samples"]) == (right.system, 3, 32, 15)
    assert row["gpu_p50_ms"] > 0 and row["wall_p50_ms"] > 0 and 0 < row["error"] <= row["error_limit"]
    assert [(each["system"], each["batch"]) for each in refused] == [(dead.system, 3), (fails.system, 3)]
    assert (
        "differ from the float64 reference" in refused[0]["reason"] and refused[1]["reason"] == "MemoryError: no more"
    )


def test_16_bits_are_allowed_three_times_what_pytorch_loses(form: Form) -> None:
    asked = batches(rows_of(form.bundle)[:6], Shape(3, 32))
    noise = form.bundle.manifest.reference.noise
    for precision, coarser in (("fp16", 2**13), ("bf16", 2**16)):
        lost = asked.error(per_adapter(form, precision, "cpu"))
        assert LIMIT * noise < lost <= limit_of(precision, lost, noise, is_pytorch=True) == LIMIT * noise * coarser
        assert limit_of(precision, lost, noise, is_pytorch=False) == 3 * lost


def test_a_graph_in_16_bits_loses_no_more_and_more_than_float32_may(form: Form, tmp_path: Path) -> None:
    asked = batches(rows_of(form.bundle), SHAPE)
    session = OrtSession("onnxruntime-cpu", typed_graph(form, "fp16", tmp_path / "graph"), None)
    of_pytorch = pytorch_errors({"mixed": form}, "fp16")(form, asked)
    figures, why = held(Planned("ONNX Runtime CUDA", "mixed", "fp16"), session, form, asked, of_pytorch)
    assert why is None and figures["error"] <= 3 * of_pytorch
    # it is a graph in 16 bits: as one in float32 it would be refused
    assert held(Planned("ONNX Runtime CUDA", "mixed", "fp32"), session, form, asked, 0.0)[1] is not None


def test_an_engine_is_built_for_the_shapes_and_a_gpu_that_is_not_known_is_refused(form: Form) -> None:
    shapes = [Shape(1, 16), Shape(16, 128)]
    record = build_engine(form, "tensorrt-rtx", "fp32", shapes, "8.9")
    assert record.name == "tensorrt-rtx-fp32" and record.compute_capabilities == ["8.9"]
    assert str(record.profile["batch"]) == "1,16,16" and str(record.profile["sequence"]) == "16,128,128"
    assert "adapter/lambda" in record.optional and (form.bundle.path / record.file).is_file()
    with pytest.raises(RuntimeTargetError, match=r"does not build for compute capability 9\.0"):
        build_engine(form, "tensorrt-rtx", "fp32", shapes, "9.0")


def test_folding_into_pytorch_weights_changes_no_answer() -> None:
    own, other = adapters("lorfa", 2).values()
    feeds = text_feeds(16, 16)

    def answer(adapter: Adapter, form: str, precision: str) -> Array:
        return TorchModel(pytorch_model(adapter, form, precision, "cpu")).answer(feeds)

    truth = answer(own, "side op", "fp64")
    noise = normwise(answer(own, "side op", "fp32"), truth)
    assert 0 < normwise(answer(own, "folded", "fp32"), truth) <= LIMIT * noise
    assert normwise(answer(other, "folded", "fp32"), truth) > 1000 * noise


def test_what_was_compiled_for_one_model_does_not_run_for_another() -> None:
    """By default ``torch.compile`` takes a model with hooks for one without."""
    import torch
    from torch import nn

    from deployfa.training.reference import attach

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4))

    x = torch.ones(2, 4)
    adapted = attach(model(), Adapter("vefa", {"0": Edit(lam=np.ones(4, np.float32))}))
    with torch.inference_mode():
        plain = compiled(model(), backend="eager")(x)
        torch.testing.assert_close(compiled(adapted, backend="eager")(x), adapted(x))
        assert not torch.equal(plain, adapted(x))


@pytest.mark.slow
def test_slots_are_run_with_the_adapter_that_they_came_with(tmp_path: Path) -> None:
    form = make_forms(tmp_path / "forms", "vefa", forms=["slots"], rows=[Row(text) for text in SENTENCES])["slots"]
    asked = batches(rows_of(form.bundle), Shape(8, 32))
    planned = Planned("ONNX Runtime CUDA, fused", "slots", "fp32")
    graph = typed_graph(form, "fp32", tmp_path / "graph", fusion="ort")
    assert held(planned, OrtSession("onnxruntime-cpu", graph, None), form, asked, 0.0)[1] is None
    empty = dataclasses.replace(graph, bound={**graph.bound, **idle_row(form.bundle)})
    assert held(planned, OrtSession("onnxruntime-cpu", empty, None), form, asked, 0.0)[1] is not None
