"""``find_rate``: how much a server takes within a latency objective."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from deployfa.bench.statistics import minimum_samples, percentile
from deployfa.errors import InputError, StatisticsError
from deployfa.load.client import Outcome
from deployfa.load.open_loop import Samples
from deployfa.load.options import LoadOptions
from deployfa.load.prepare import PACKAGES, Prepared, Progress, load_settings, prepare
from deployfa.load.report import RateReport, Step, Verdict
from deployfa.load.run import in_loop
from deployfa.load.search import search
from deployfa.versions import installed

__all__ = ["blame", "find_rate"]

_FAILED_SHARE = 0.01
#: A step of ``find_rate`` at a low rate lasts longer than asked, so that its percentile has samples; at most so much.
_LONGEST = 10
_BUSY_SHARE = 0.9


def find_rate(options: LoadOptions, *, quantile: float = 0.99, progress: Progress | None = None) -> RateReport:
    """The highest rate, within 5 %, at which ``quantile`` of the requests are answered within ``options.slo_ms`` and
    fewer than 1 % fail; a request that failed or was shed counts as late.  ``options.rate`` is the first that is tried.

    Each step lasts ``options.duration``, or longer where the percentile needs more requests (``minimum_samples``).
    Raises what ``run_load`` does, and ``InputError`` without an objective.
    """
    slo_ms = options.slo_ms
    if slo_ms is None:
        raise InputError("a rate is found for an objective; pass --slo-ms, such as --slo-ms 50")
    try:
        needed = minimum_samples(quantile)
    except StatisticsError:
        raise InputError(f"--slo-quantile {quantile:g} is not between 0 and 1; p99 is 0.99") from None
    # the number of arrivals scatters by its root
    planned = needed + 4 * math.sqrt(needed)
    lowest = planned / (_LONGEST * options.duration)
    if options.rate < lowest:
        raise InputError(
            f"p{100 * quantile:g} needs {needed} answers, and {options.rate:g} a second for {options.duration:g} s are "
            "too few; pass a longer --duration, or another --slo-quantile"
        )

    async def work() -> RateReport:
        async with prepare(options) as prepared:
            interrupted = False
            number = 0

            async def measure(rate: float) -> Step | None:
                nonlocal interrupted, number
                number += 1
                seconds = max(options.duration, planned / rate)
                samples, _ = await prepared.samples(rate, seconds, number, progress)
                interrupted = samples.interrupted
                return None if interrupted else _step(samples, prepared, rate, slo_ms, quantile)

            found, steps = await search(measure, options.rate, lowest)
        limited_by: Literal["server", "generator"] | None = None
        if found.limit is not None:
            limited_by = "generator" if found.limit.verdict == "generator" else "server"
        warnings = []
        if limited_by == "generator":
            warnings.append("the generator was the limit, the server may be capable of more; run it on another machine")
        return RateReport(
            url=options.base_url,
            server=prepared.server,
            model=prepared.model,
            settings=load_settings(options, options.rate, options.duration),
            slo_ms=slo_ms,
            quantile=quantile,
            found_per_s=found.rate,
            limit_per_s=found.limit.rate_per_s if found.limit is not None else None,
            limited_by=limited_by,
            interrupted=interrupted,
            steps=steps,
            machine=prepared.machine,
            versions=installed(PACKAGES),
            warnings=warnings,
        )

    return in_loop(work())


def _step(samples: Samples, prepared: Prepared, rate: float, slo_ms: float, quantile: float) -> Step:
    report = prepared.summary(samples, rate, samples.seconds, 0)
    share = report.objective.share if report.objective is not None else 0.0
    failed_share = (report.failed + report.shed) / report.sent if report.sent else 0.0
    try:
        quantile_ms = percentile(1e3 * samples.latency_s[samples.ok], quantile)
    except StatisticsError:
        quantile_ms = None
    verdict: Verdict = "within"
    if failed_share >= _FAILED_SHARE:
        verdict = "errors"
    elif share < quantile or quantile_ms is None:
        verdict = blame(samples, slo_ms, quantile)
    return Step(
        rate_per_s=rate,
        seconds=samples.seconds,
        sent=report.sent,
        achieved_per_s=report.achieved_per_s,
        quantile_ms=quantile_ms,
        share=share,
        failed_share=failed_share,
        late_p99_ms=report.generator.late_p99_ms,
        cpu_share=report.generator.cpu_share,
        verdict=verdict,
    )


def blame(samples: Samples, slo_ms: float, quantile: float) -> Literal["late", "generator"]:
    """Who kept a step from its objective: the generator, if it was busy all the time, or if the objective would have
    been met had every request been sent when it was to be.
    """
    decided = samples.outcome != Outcome.UNFINISHED
    on_time = samples.ok & (1e3 * (samples.latency_s - samples.late_s) <= slo_ms)
    met = np.count_nonzero(on_time) >= quantile * np.count_nonzero(decided)
    return "generator" if met or samples.cpu_share > _BUSY_SHARE else "late"
