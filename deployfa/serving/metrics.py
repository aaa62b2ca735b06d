"""What Prometheus reads at ``/metrics``.

An adapter is a label, and a label is memory here and in Prometheus: the first ``max_adapters`` that were asked for have
their own series, all later ones are counted together as ``_other``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deployfa.serving.runs import Batch
from deployfa.serving.work import Answered

__all__ = ["OTHER", "Metrics"]

#: The label of adapters that have no series of their own.
OTHER = "_other"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75)


class Metrics:
    """Thread-safe.  Seconds and rows, as Prometheus' own names say."""

    def __init__(self, *, max_adapters: int = 100) -> None:
        self.registry = CollectorRegistry()
        self._max_adapters = max_adapters
        self._adapters: dict[tuple[str, str], _Series] = {}
        self._others: dict[str, _Series] = {}
        both = ("model", "adapter")
        made: dict[str, Any] = {"registry": self.registry, "namespace": "deployfa"}
        self._requests = Counter("requests", "Inference requests, by HTTP status.", (*both, "status"), **made)
        self._errors = Counter("errors", "Inference requests that were not answered.", both, **made)
        self._rows = Counter("rows", "Rows that were answered.", both, **made)
        self._queue = Histogram("queue_seconds", "From arrival to the batch.", both, buckets=_SECONDS, **made)
        self._compute = Histogram("compute_seconds", "The model's run.", both, buckets=_SECONDS, **made)
        self._seconds = Histogram("request_seconds", "From arrival to the answer.", both, buckets=_SECONDS, **made)
        self._batch_rows = Histogram("batch_rows", "Rows of a batch.", ("model",), buckets=_ROWS, **made)
        self._batch_adapters = Histogram("batch_adapters", "Adapters of a batch.", ("model",), buckets=_ROWS, **made)
        self._padding = Histogram("padding_ratio", "Share of padding.", ("model",), buckets=_SHARES, **made)
        self._refused = Counter("refused", "Requests that reached no model, by HTTP status.", ("status",), **made)
        self.connections = Gauge("connections", "Open connections.", **made)

    def watch(self, models: Models) -> None:
        """Also tell, when asked, what ``models`` say of themselves."""
        self.registry.register(_Watched(models))

    def answered(self, model: str, adapter: str, answer: Answered, rows: int, seconds: float) -> None:
        series = self._series(model, adapter)
        series.ok.inc()
        series.rows.inc(rows)
        series.queue.observe(answer.queue_s)
        series.compute.observe(answer.compute_s)
        series.seconds.observe(seconds)

    def failed(self, model: str, adapter: str, status: int) -> None:
        series = self._series(model, adapter)
        self._requests.labels(model, series.adapter, str(status)).inc()
        series.errors.inc()

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def ran(self, model: str, batch: Batch) -> None:
        self._batch_rows.labels(model).observe(batch.rows)
        self._batch_adapters.labels(model).observe(batch.adapters)
        self._padding.labels(model).observe(batch.padding)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _series(self, model: str, adapter: str) -> _Series:
        series = self._adapters.get((model, adapter))
        if series is not None:
            return series
        if len(self._adapters) < self._max_adapters:
            series = self._adapters[(model, adapter)] = _Series(self, model, adapter)
            return series
        other = self._others.get(model)
        if other is None:
            other = self._others[model] = _Series(self, model, OTHER)
        return other


class _Series:
    """The children of one model and adapter, looked up once."""

    def __init__(self, metrics: Metrics, model: str, adapter: str) -> None:
        self.adapter = adapter
        self.ok = metrics._requests.labels(model, adapter, "200")
        self.errors = metrics._errors.labels(model, adapter)
        self.rows = metrics._rows.labels(model, adapter)
        self.queue = metrics._queue.labels(model, adapter)
        self.compute = metrics._compute.labels(model, adapter)
        self.seconds = metrics._seconds.labels(model, adapter)


class Models(Protocol):
    """What ``Metrics.watch`` asks: figures and counts, name → model → value."""

    def gauges(self) -> Mapping[str, Mapping[str, float]]: ...

    def counters(self) -> Mapping[str, Mapping[str, float]]: ...


class _Watched:
    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        for name, values in self._models.gauges().items():
            gauge = GaugeMetricFamily(f"deployfa_{name}", name.replace("_", " ").capitalize() + ".", labels=["model"])
            for model, value in values.items():
                gauge.add_metric([model], value)
            yield gauge
        for name, values in self._models.counters().items():
            count = CounterMetricFamily(f"deployfa_{name}", name.replace("_", " ").capitalize() + ".", labels=["model"])
            for model, value in values.items():
                count.add_metric([model], value)
            yield count
