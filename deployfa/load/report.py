"""What a run of load found.  ``msgspec.json.schema(LoadReport)`` is the published schema."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import msgspec
import numpy as np

from deployfa.bench.machine import Machine
from deployfa.bench.statistics import percentile
from deployfa.errors import StatisticsError
from deployfa.load.client import Outcome, kind_of
from deployfa.load.discovery import ServerInfo
from deployfa.load.intervals import quantile_interval
from deployfa.load.open_loop import Samples

__all__ = [
    "QUANTILES",
    "Generator",
    "Latency",
    "LoadReport",
    "LoadSettings",
    "Objective",
    "RateReport",
    "Step",
    "Verdict",
    "summarise",
]

QUANTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
Verdict = Literal["within", "late", "errors", "generator"]

_LATE_SHARE = 0.1
_BUSY_SHARE = 0.9


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for.  payload: ``16 tokens, batch 1`` or ``3 texts``.  adapters: as given."""

    rate_per_s: float
    duration_s: float
    warmup_s: float
    timeout_s: float
    payload: str
    adapters: str | None
    strength: float | None
    max_connections: int | None
    seed: int


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """A percentile in milliseconds, from the intended send time, and its 95 % interval (``quantile_interval``); an end
    that the samples do not reach is ``None``.
    """

    ms: float
    low_ms: float | None
    high_ms: float | None


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """goodput_per_s: answers within ``slo_ms`` a second.  share: of all requests sent; what failed was not within."""

    slo_ms: float
    goodput_per_s: float
    share: float


class Generator(msgspec.Struct, frozen=True, kw_only=True):
    """This process, which is no part of the server.  late: actual minus intended send time, waiting for a connection
    included.  cpu_share: of one core, while sending.
    """

    late_p50_ms: float | None
    late_p99_ms: float | None
    late_max_ms: float
    cpu_share: float
    event_loop: str

    @property
    def late(self) -> tuple[str, float]:
        """The percentile to judge it by, in ms; the median of a short run: one hitch is no bottleneck."""
        if self.late_p99_ms is not None:
            return "p99", self.late_p99_ms
        return "p50", self.late_p50_ms or 0.0


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run at one rate, warm-up left out.  sent = ok + shed + the errors + unfinished (in flight at Ctrl-C).

    offered_per_s: sent a second, a draw around ``settings.rate_per_s``.  achieved_per_s: answers a second until the
    last one.  latency: of answers (``ok``) only, by percentile; what failed is counted.  errors: by HTTP status,
    ``timeout`` or ``connection``; shed: refused with 503 and Retry-After.  A percentile that the samples do not support
    is not in ``latency`` and ``refused`` says why.  adapters_named: different ones that requests named.
    """

    url: str
    server: ServerInfo
    model: str
    settings: LoadSettings
    interrupted: bool
    seconds: float
    offered_per_s: float
    achieved_per_s: float
    sent: int
    ok: int
    shed: int
    errors: dict[str, int]
    unfinished: int
    latency: dict[str, Latency]
    max_ms: float | None
    refused: dict[str, str]
    objective: Objective | None
    adapters_named: int
    generator: Generator
    machine: Machine
    versions: dict[str, str]
    warnings: list[str]

    @property
    def failed(self) -> int:
        """Errors, not what was shed."""
        return sum(self.errors.values())


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One rate that was tried.  quantile_ms: of answers; share: of requests that were answered within the objective;
    failed_share: errors and shed.  verdict: ``within``; ``late``; ``errors`` (1 % or more failed); ``generator``, not
    within, and this process may be the reason.
    """

    rate_per_s: float
    seconds: float
    sent: int
    achieved_per_s: float
    quantile_ms: float | None
    share: float
    failed_share: float
    late_p99_ms: float | None
    cpu_share: float
    verdict: Verdict


class RateReport(msgspec.Struct, frozen=True, kw_only=True):
    """found_per_s: the highest rate at which the objective was met, ``None`` where no rate that was tried met it.

    limit_per_s: the lowest rate above it at which it was not met; ``None`` where there was none.  limited_by:
    what kept it from more.
    """

    url: str
    server: ServerInfo
    model: str
    settings: LoadSettings
    slo_ms: float
    quantile: float
    found_per_s: float | None
    limit_per_s: float | None
    limited_by: Literal["server", "generator"] | None
    interrupted: bool
    steps: list[Step]
    machine: Machine
    versions: dict[str, str]
    warnings: list[str]


def summarise(
    samples: Samples,
    *,
    url: str,
    server: ServerInfo,
    model: str,
    settings: LoadSettings,
    slo_ms: float | None,
    adapters_named: int,
    event_loop: str,
    machine: Machine,
    versions: dict[str, str],
) -> LoadReport:
    """Samples → the report on them."""
    answered_ms = 1e3 * samples.latency_s[samples.ok]
    latency: dict[str, Latency] = {}
    refused: dict[str, str] = {}
    for name, q in QUANTILES.items():
        try:
            ms = percentile(answered_ms, q)
        except StatisticsError as error:
            refused[name] = str(error)
            continue
        low, high = quantile_interval(answered_ms, q)
        latency[name] = Latency(ms=ms, low_ms=low, high_ms=high)
    counts = Counter(samples.outcome.tolist())
    generator = _generator(samples, event_loop)
    return LoadReport(
        url=url,
        server=server,
        model=model,
        settings=settings,
        interrupted=samples.interrupted,
        seconds=samples.seconds,
        offered_per_s=_rate(len(samples.outcome), samples.seconds),
        achieved_per_s=_rate(len(answered_ms), samples.elapsed_s),
        sent=len(samples.outcome),
        ok=counts.pop(Outcome.OK, 0),
        shed=counts.pop(Outcome.SHED, 0),
        unfinished=counts.pop(Outcome.UNFINISHED, 0),
        errors={kind_of(outcome): count for outcome, count in counts.most_common()},
        latency=latency,
        max_ms=float(answered_ms.max()) if answered_ms.size else None,
        refused=refused,
        objective=None if slo_ms is None else _objective(samples, slo_ms),
        adapters_named=adapters_named,
        generator=generator,
        machine=machine,
        versions=versions,
        warnings=_warnings(generator, latency.get("p50"), settings.max_connections),
    )


def _objective(samples: Samples, slo_ms: float) -> Objective:
    within = int(np.count_nonzero(1e3 * samples.latency_s[samples.ok] <= slo_ms))
    decided = int(np.count_nonzero(samples.outcome != Outcome.UNFINISHED))
    return Objective(
        slo_ms=slo_ms, goodput_per_s=_rate(within, samples.elapsed_s), share=within / decided if decided else 0.0
    )


def _generator(samples: Samples, event_loop: str) -> Generator:
    late_ms = 1e3 * samples.late_s[samples.outcome != Outcome.UNFINISHED]

    def supported(q: float) -> float | None:
        try:
            return percentile(late_ms, q)
        except StatisticsError:
            return None

    return Generator(
        late_p50_ms=supported(0.5),
        late_p99_ms=supported(0.99),
        late_max_ms=float(late_ms.max()) if late_ms.size else 0.0,
        cpu_share=samples.cpu_share,
        event_loop=event_loop,
    )


def _warnings(generator: Generator, median: Latency | None, max_connections: int | None) -> list[str]:
    found = []
    name, late = generator.late
    if median is not None and late > _LATE_SHARE * median.ms:
        fix = "raise --max-connections" if max_connections is not None else "give it a quieter machine"
        found.append(
            f"the generator sent late ({late:.3g} ms at {name}, the median answer took {median.ms:.3g} ms), so the "
            f"figures are in part its own; lower --rate, or {fix}"
        )
    if generator.cpu_share > _BUSY_SHARE:
        found.append(
            f"the generator used {100 * generator.cpu_share:.0f} % of a core and may have been the bottleneck, not the "
            "server; lower --rate, or run several on other machines"
        )
    return found


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
