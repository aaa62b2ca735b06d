"""The page as a browser's parser sees it."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import msgspec
import pytest

from deployfa.errors import InputError, OutputExistsError
from deployfa.report import DemoReport
from deployfa.report.page import read_report, write_page

HOSTILE = (
    """</title></style><script>alert(1)</script><img src=x onerror=alert(1)>'"&amp; $\\frac{ \x1b[31m \x00 ]]> -->"""
)
#: Short enough to stand whole in a plot's label.
HOSTILE_LABEL = "<script>$\\fr{]]>--><b a=\"'\x1b"
#: Fields whose values the format fixes.
FIXED = {"format", "spinning", "verdict"}


class Page(HTMLParser):
    """Collects what is on the page; ``problems`` are tags that do not match."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.problems: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for _, found, value in self.attributes if found == name]


def written(report: DemoReport, tmp_path) -> str:
    return write_page(report, tmp_path / "page.html", force=True).read_text(encoding="utf-8")


def change_bench(report: DemoReport, **change) -> DemoReport:
    results = [msgspec.structs.replace(each, **change) for each in report.bench.results]
    return msgspec.structs.replace(report, bench=msgspec.structs.replace(report.bench, results=results))


def test_the_parser_finds_what_does_not_match():
    assert Page("<p><b>x</p></b>").problems and Page("<p>").problems and Page("</p>").problems
    assert not Page("<p><b>x</b><br></p><path d='M0' />").problems


def test_well_formed_and_alone(report, tmp_path):
    page = Page(written(report, tmp_path))
    assert page.problems == []
    ids = page.values("id")
    assert len(ids) == len(set(ids)) > 100
    references = [value.removeprefix("#") for value in page.values("href")]
    references += re.findall(r"url\(#([^)]+)\)", " ".join(value for _, _, value in page.attributes))
    assert references and set(references) <= set(ids)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "metadata"}
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert {"svg", "figure", "table"} <= page.tags
    assert "default-src 'none'" in " ".join(page.values("content"))


def test_every_figure_is_there(report, tmp_path):
    page = Page(written(report, tmp_path))
    assert ["vefa", "21,506", "118", "80.1", "79.2", "79.4", "77.6", "78.7"] in page.rows
    assert ["side-op", "0", "36", "20,736", "82,944", "91.1", "ort, 11/12 kept"] in page.rows
    stage = ["ONNX Runtime, as deployed", "4.59e-07", "1.12", "1.4e-06", "3.3e-07", "0", "81.50", "1.00", "pass"]
    assert stage in page.rows
    timing = ["8x128", "side-op", "69.8", "73.3", "76.1", "–", "1.028 [1.012, 1.043]", "slower"]
    assert [row[:8] for row in page.rows].count(timing) == 1
    assert ["train vefa", "121.0", ""] in page.rows
    assert ["base", "99.5 to 104", "86.1 to 91.2", "149 to 163", "14.1 to 15.0", "214", "90.9"] in page.rows
    assert ["amazon", "lora", "2,900", "82.9", "82.3"] in page.rows
    for words in ("p99 needs 662 samples", report.bench.warnings[0], report.sentence.text, "onnxruntime 1.32.0"):
        assert words in page.text
    assert page.text.count("1.028 [1.012, 1.043]") == 3, "in the card, the plot and the table"


def test_unsupported_figures_are_dashes(report, tmp_path):
    nothing = dict.fromkeys(("p50_ms", "p90_ms", "p95_ms", "p99_ms", "ratio", "verdict", "gflop_per_s"))
    page = Page(written(change_bench(report, **nothing), tmp_path))
    rows = [row for row in page.rows if row[:2] == ["8x128", "folded"]]
    assert [row[2:8] for row in rows] == [["–"] * 6]
    assert "None" not in page.text and page.problems == []


def hostile(value, added: str, key: str = ""):
    if isinstance(value, dict):
        named = key in {"scores", "parity", "stage_seconds", "versions"}
        return {(k + added if named else k): hostile(v, added, k) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(each, added, key) for each in value]
    return value + added if isinstance(value, str) and key not in FIXED else value


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
@pytest.mark.parametrize(("added", "seen"), [(HOSTILE, "<script>alert(1)</script>"), (HOSTILE_LABEL, "<script>$\\fr")])
def test_a_hostile_report_stays_text(report, tmp_path, added, seen):
    attacked = msgspec.convert(hostile(msgspec.to_builtins(report), added), DemoReport)
    page, honest = Page(written(attacked, tmp_path)), Page(written(report, tmp_path))
    assert page.problems == []
    assert page.tags == honest.tags
    assert {name for _, name, _ in page.attributes} == {name for _, name, _ in honest.attributes}
    assert page.text.count(seen) > 40
    assert "\x1b" not in page.text and "\x00" not in page.text


def test_same_report_same_page(report, tmp_path):
    assert written(report, tmp_path) == written(report, tmp_path)


def test_failed_parity_is_said_first(report, tmp_path):
    found = report.parity["folded"]
    stages = [*found.stages[:-1], msgspec.structs.replace(found.stages[-1], passed=False, noise_ratio=float("inf"))]
    failed = msgspec.structs.replace(found, stages=stages, passed=False, reason="error is 80x the float32 noise")
    text = Page(written(msgspec.structs.replace(report, parity={**report.parity, "folded": failed}), tmp_path)).text
    assert text.index("Parity FAILED for folded: error is 80x") < text.index("Summary")
    assert "1 of 2 pass" in text and "∞× noise" in text
    assert "FAILED" not in Page(written(report, tmp_path)).text


def test_an_empty_report_has_a_page(report, tmp_path):
    bench = msgspec.structs.replace(report.bench, contenders=[], results=[], ceilings=[], warnings=[])
    empty = msgspec.structs.replace(report, methods=[], bundles=[], parity={}, bench=bench, stage_seconds={})
    page = Page(written(empty, tmp_path))
    assert page.problems == [] and "svg" not in page.tags and "table" in page.tags


def test_without_matplotlib_the_tables_are_there(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(written(report, tmp_path))
    assert page.problems == [] and "svg" not in page.tags
    assert "pip install 'deployfa[report]'" in page.text
    assert ["vefa", "21,506", "118", "80.1", "79.2", "79.4", "77.6", "78.7"] in page.rows


def test_never_overwrites_unasked(report, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match="--force"):
        write_page(report, path)
    assert path.read_text() == "mine"
    assert write_page(report, path, force=True) == path
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_report_comes_back_whole(report, tmp_path):
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode(report))
    assert read_report(path) == report


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda whole: whole[: len(whole) // 2], "is not whole JSON"),
        (lambda whole: b"", "is not whole JSON"),
        (lambda whole: b'{"x":' + b"[" * 100_000, "is not whole JSON"),
        (lambda whole: whole.replace(b"minilm", b"\xff\xfe"), "is not whole JSON"),
        (lambda whole: whole.replace(b"deployfa-demo/1", b"deployfa-demo/9"), "deployfa-demo/9"),
        (lambda whole: whole.replace(b'"train_rows":3000', b'"train_rows":"many"'), "train_rows"),
        (lambda whole: b"{}", "missing required field"),
        (lambda whole: b"null", "is not a report"),
    ],
)
def test_broken_report(report, tmp_path, corrupt, message):
    path = tmp_path / "report.json"
    whole = msgspec.json.encode(report)
    assert corrupt(whole) != whole
    path.write_bytes(corrupt(whole))
    with pytest.raises(InputError) as caught:
        read_report(path)
    assert message in str(caught.value) and "; pass the report.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_report(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_report(tmp_path / "report.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_report(tmp_path)
