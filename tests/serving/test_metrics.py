"""/metrics: what Prometheus reads, and that each figure moves when it must and only then."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployfa.serving.metrics import OTHER, Metrics
from deployfa.serving.runs import Batch
from deployfa.serving.work import Answered

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
BODY = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["A joy.", "I want my money back."]}]}


def parsed(text: str) -> Samples:
    """(name, labels) → value of every sample; no sample twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"deployfa_{name}", frozenset(labels.items())), 0.0)


@pytest.fixture(scope="module")
def read(served) -> Callable[[], Samples]:
    def now() -> Samples:
        status, content, headers = served.ask("/metrics")
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
        return parsed(content.decode())

    return now


@pytest.fixture
def moved(read: Callable[[], Samples]) -> Callable[..., float]:
    """``moved("rows_total", model=…)``: by how much since the test began, read anew each time."""
    before = read()

    def difference(name: str, **labels: str) -> float:
        return value(read(), name, **labels) - value(before, name, **labels)

    return difference


def infer(served, model: str, status: int = 200, **parameters: Any) -> Any:
    got, answer, _ = served.ask(f"/v2/models/{model}/infer", BODY | {"parameters": parameters})
    assert got == status, answer
    return answer


class TestRequests:
    def test_an_answer(self, served, moved) -> None:
        for _ in range(3):
            infer(served, "pack", adapter="vefa")
        labels = {"model": "pack", "adapter": "vefa"}
        assert moved("requests_total", **labels, status="200") == 3
        assert moved("rows_total", **labels) == 6
        assert moved("errors_total", **labels) == 0
        for name in ("queue_seconds", "compute_seconds", "request_seconds"):
            assert moved(f"{name}_count", **labels) == 3
            assert moved(f"{name}_bucket", **labels, le="+Inf") == 3
        whole = moved("request_seconds_sum", **labels)
        assert 0 < moved("queue_seconds_sum", **labels) + moved("compute_seconds_sum", **labels) <= whole < 60
        assert moved("requests_total", model="pack", adapter="lorfa", status="200") == 0

    def test_a_model_that_is_one_adapter(self, served, moved) -> None:
        infer(served, "folded")
        assert moved("requests_total", model="folded", adapter="", status="200") == 1

    def test_a_refusal_makes_no_series_of_a_strangers_words(self, served, moved, read) -> None:
        infer(served, "pack", 404, adapter="a-stranger's-word")
        infer(served, "pack", 400)
        assert moved("requests_total", model="pack", adapter="", status="404") == 1
        assert moved("requests_total", model="pack", adapter="", status="400") == 1
        assert moved("errors_total", model="pack", adapter="") == 2
        assert not any("stranger" in value for _, labels in read() for _, value in labels)

    def test_a_deadline_that_passed_is_its_adapters(self, served, moved) -> None:
        infer(served, "pack", 503, adapter="lorfa", timeout=1)
        assert moved("requests_total", model="pack", adapter="lorfa", status="503") == 1
        assert moved("errors_total", model="pack", adapter="lorfa") == 1
        assert moved("rows_total", model="pack", adapter="lorfa") == 0

    def test_what_reached_no_model(self, served, moved, read) -> None:
        infer(served, "no-such-model", 404)
        assert served.ask("/v2/repository/models/pack/load", {})[0] == 401
        assert moved("refused_total", status="404") == 1 and moved("refused_total", status="401") == 1
        assert not any("no-such-model" in value for _, labels in read() for _, value in labels)


class TestBatches:
    def test_a_batch_has_rows_adapters_and_padding(self, served, moved) -> None:
        infer(served, "baked", adapter="vefa")
        labels = {"model": "baked"}
        for name in ("batch_rows", "batch_adapters", "padding_ratio"):
            assert moved(f"{name}_count", **labels) == 1
        assert moved("batch_rows_sum", **labels) == 2
        assert moved("batch_rows_bucket", **labels, le="1.0") == 0
        assert moved("batch_rows_bucket", **labels, le="2.0") == 1
        assert moved("batch_adapters_sum", **labels) == 1
        # a request that rides alone is padded by nobody
        assert moved("padding_ratio_sum", **labels) == 0

    def test_rows_of_batches_are_rows_of_requests(self, served, moved) -> None:
        adapters = ["vefa", "lorfa", "base"] * 8
        with ThreadPoolExecutor(12) as threads:
            list(threads.map(lambda adapter: infer(served, "baked", adapter=adapter), adapters))
        assert moved("batch_rows_sum", model="baked") == 2 * len(adapters)
        answered = sum(moved("rows_total", model="baked", adapter=adapter) for adapter in set(adapters))
        assert answered == 2 * len(adapters)
        batches = moved("batch_rows_count", model="baked")
        assert 1 <= batches <= len(adapters)
        assert batches <= moved("batch_adapters_sum", model="baked") <= 3 * batches


class TestModels:
    def test_adapters_come_are_replaced_and_go(self, served, moved, read, trained: dict[str, Path]) -> None:
        headers = {"Authorization": f"Bearer {served.admin}"}
        path, content = "/v2/models/pack/adapters/new", trained["vefa"].read_bytes()
        labels = {"model": "pack"}
        for count in (1, 2):
            assert served.ask(path, content, method="PUT", headers=headers)[0] == 200
            assert moved("adapter_loads_total", **labels) == count
            assert moved("adapter_replacements_total", **labels) == count - 1
            assert moved("adapters_resident", **labels) == 1
        assert served.ask(path, b"no adapter", method="PUT", headers=headers)[0] == 400
        assert moved("adapter_failures_total", **labels) == 1 and moved("adapter_loads_total", **labels) == 2
        assert served.ask(path, method="DELETE", headers=headers)[0] == 200
        assert moved("adapters_resident", **labels) == 0 and moved("adapter_evictions_total", **labels) == 0

    def test_every_model_is_watched_while_it_is_loaded(self, served, read) -> None:
        names = {"pack", "baked", "folded", "slots"}
        samples = read()
        assert {dict(labels)["model"] for name, labels in samples if name == "deployfa_ready"} == names
        assert all(value(samples, "ready", model=name) == 1 for name in names)
        assert all(value(samples, "queue_requests", model=name) == 0 for name in names)
        headers = {"Authorization": f"Bearer {served.admin}"}
        assert served.ask("/v2/repository/models/folded/unload", {}, headers=headers)[0] == 200
        samples = read()
        assert {dict(labels)["model"] for name, labels in samples if name == "deployfa_ready"} == names - {"folded"}
        assert served.ask("/v2/repository/models/folded/load", {}, headers=headers)[0] == 200


def test_open_connections_are_counted(served, moved) -> None:
    before = moved("connections")
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = http.client.HTTPConnection(*served.address, timeout=30)
            stack.callback(connection.close)
            connection.request("GET", "/v2/health/live")
            assert connection.getresponse().read() == b""
        assert moved("connections") == before + 3


class TestTheLimitOnSeries:
    ANSWER = Answered({}, 0.001, 0.002, 1, 0.0)

    def test_more_adapters_are_counted_together(self) -> None:
        metrics = Metrics(max_adapters=2)
        for name in ("a", "b", "c", "d", "a"):
            metrics.answered("m", name, self.ANSWER, 3, 0.004)
        metrics.failed("m", "c", 503)
        metrics.failed("m", "a", 503)
        metrics.answered("other-model", "a", self.ANSWER, 1, 0.004)
        samples = parsed(metrics.text().decode())

        def requests(model: str, adapter: str, status: str = "200") -> float:
            return value(samples, "requests_total", model=model, adapter=adapter, status=status)

        assert [requests("m", name) for name in ("a", "b", OTHER)] == [2, 1, 2]
        assert [requests("m", name, "503") for name in ("a", "b", OTHER)] == [1, 0, 1]
        assert requests("other-model", OTHER) == 1
        assert value(samples, "rows_total", model="m", adapter=OTHER) == 6
        assert value(samples, "errors_total", model="m", adapter=OTHER) == 1
        assert value(samples, "queue_seconds_count", model="m", adapter=OTHER) == 2
        shown = {dict(labels).get("adapter") for _, labels in samples}
        assert shown - {None} == {"a", "b", OTHER}

    def test_seconds_go_into_their_buckets(self) -> None:
        metrics = Metrics()
        for seconds in (0.0004, 0.003, 30.0):
            metrics.answered("m", "a", Answered({}, seconds, seconds, 1, 0.0), 1, seconds)
        samples = parsed(metrics.text().decode())
        for le, count in (("0.0005", 1), ("0.0025", 1), ("0.005", 2), ("10.0", 2), ("+Inf", 3)):
            for name in ("queue", "compute", "request"):
                assert value(samples, f"{name}_seconds_bucket", model="m", adapter="a", le=le) == count

    def test_padding_and_rows_of_a_batch(self) -> None:
        metrics = Metrics()
        metrics.ran("m", Batch(rows=24, requests=3, adapters=2, compute_s=0.1, padding=0.22))
        samples = parsed(metrics.text().decode())
        assert value(samples, "padding_ratio_bucket", model="m", le="0.2") == 0
        assert value(samples, "padding_ratio_bucket", model="m", le="0.25") == 1
        assert value(samples, "batch_rows_sum", model="m") == 24
        assert value(samples, "batch_adapters_sum", model="m") == 2

    def test_names_that_need_escaping(self) -> None:
        metrics = Metrics()
        name = 'a "quoted" \\ name'
        metrics.answered(name, name, self.ANSWER, 1, 0.1)
        samples = parsed(metrics.text().decode())
        assert value(samples, "rows_total", model=name, adapter=name) == 1
