from __future__ import annotations

import math

import msgspec
import pytest

from deployfa.report.figures import DASH, domains, figure, percent, plain, ratio, shifted, shifted_mean


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234"), (None, DASH),
     (math.inf, "∞"), (-math.inf, "-∞"), (math.nan, "NaN"), (-12.34, "-12.3")],
)  # fmt: skip
def test_three_digits(value, text):
    assert figure(value) == text


def test_percent():
    assert percent(0.80149) == "80.1" and percent(0.815, 2) == "81.50" and percent(None) == DASH


def test_plain_leaves_one_harmless_line():
    assert plain("a\x1b[31mb\nc\u202ed\ud800e\x00") == "a\ufffd[31mb c\ufffdd\ufffde\ufffd"
    assert plain("naïve 日本 👩‍🔬 <b>") == "naïve 日本 👩‍🔬 <b>"


def test_ratio_needs_its_interval(report):
    base, folded = report.bench.results[:2]
    assert ratio(base) == "1" and ratio(folded) == "1.003 [0.991, 1.014]"
    assert ratio(msgspec.structs.replace(folded, ratio_low=None)) == DASH
    assert ratio(msgspec.structs.replace(folded, ratio=None)) == DASH


def test_training_domain_comes_first_and_stays_out_of_the_mean(report):
    turned = [msgspec.structs.replace(m, scores=dict(reversed(m.scores.items()))) for m in report.methods]
    report = msgspec.structs.replace(report, methods=turned)
    assert domains(report) == ["movies", "nyt", "amazon", "tweets"]
    assert shifted(report) == ["nyt", "amazon", "tweets"]
    mean = shifted_mean(report.methods[1], shifted(report))
    assert mean == pytest.approx((0.792 + 0.794 + 0.776) / 3)
    assert mean != pytest.approx((0.801 + 0.792 + 0.794 + 0.776) / 4, abs=1e-3)


def test_no_mean_over_fewer_domains(report):
    scores = {name: each for name, each in report.methods[0].scores.items() if name != "nyt"}
    assert shifted_mean(msgspec.structs.replace(report.methods[0], scores=scores), shifted(report)) is None
    assert shifted_mean(report.methods[0], []) is None
