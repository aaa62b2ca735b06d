"""Warnings say when the figures are the generator's, and only then."""

from __future__ import annotations

import pytest

from deployfa.load.report import Generator, Latency, _warnings

MEDIAN = Latency(ms=10.0, low_ms=9.0, high_ms=11.0)


@pytest.mark.parametrize(
    ("p50", "p99", "cpu", "parts"),
    [
        (0.1, 0.9, 0.5, []),
        (0.1, 1.1, 0.5, ["sent late (1.1 ms at p99, the median answer took 10 ms)"]),
        (0.1, 0.9, 0.95, ["used 95 % of a core"]),
        (2.0, 9.0, 0.95, ["sent late (9 ms at p99", "used 95 % of a core"]),
        # of a short run one late request says nothing, its median does
        (0.1, None, 0.5, []),
        (2.0, None, 0.5, ["sent late (2 ms at p50"]),
        (None, None, 0.5, []),
    ],
)
def test_the_generator_is_named_where_it_was_the_bottleneck(
    p50: float | None, p99: float | None, cpu: float, parts: list[str]
) -> None:
    generator = Generator(late_p50_ms=p50, late_p99_ms=p99, late_max_ms=9.0, cpu_share=cpu, event_loop="uvloop")
    found = _warnings(generator, MEDIAN, None)
    assert len(found) == len(parts)
    assert all(part in warning and "; " in warning for part, warning in zip(parts, found, strict=True))
