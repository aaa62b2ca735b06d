from __future__ import annotations

import io

import msgspec

from deployfa.report.table import render


def shown(report, width: int = 120) -> str:
    from rich.console import Console

    sink = io.StringIO()
    console = Console(width=width, file=sink)
    for part in render(report):
        console.print(part, highlight=False)
    return sink.getvalue()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def test_one_table_of_120_columns(report):
    text = shown(report)
    assert text.count("┌") == 1
    assert max(map(len, text.splitlines())) <= 120
    assert shown(report, width=200) == shown(report, width=160), "it does not want more than it has"
    found = rows(text)
    assert ["vefa", "21,506", "80.1", "79.2", "79.4", "77.6", "78.7"] in found
    assert ["side-op", "0", "36", "20,736", "82,944", "91.1", "ort, 11/12 kept"] in found
    assert ["side-op", "4.6e-07", "1.12", "2", "0", "208", "pass"] in found
    assert ["8x128 folded", "67.2", "73.2", "0.989", "0.979, 0.998", "312", "faster"] in found
    assert ["1x128 base", "9.86", "10.7", "1", "", "312", "reference"] in found
    assert "“The plot is thin, but I left with a smile.” → positive (0.981)" in text
    assert f"warning: {report.bench.warnings[0]}" in text


def test_units_stand_in_the_headings(report):
    words = " ".join(cell for row in rows(shown(report)) for cell in row)
    for unit in ("accuracy (%)", "p50 (ms)", "error / noise", "graph (MB)", "FLOP / token", "95 % interval"):
        assert unit in words


def test_unsupported_figures_are_dashes(report):
    results = [msgspec.structs.replace(each, p95_ms=None, ratio=None, verdict=None) for each in report.bench.results]
    bench = msgspec.structs.replace(report.bench, results=results)
    found = rows(shown(msgspec.structs.replace(report, bench=bench)))
    assert ["8x128 folded", "67.2", "–", "–", "", "312", "–"] in found


def test_failed_parity_shows(report):
    failed = msgspec.structs.replace(report.parity["folded"], passed=False, reason="NaN or infinity in the output")
    text = shown(msgspec.structs.replace(report, parity={**report.parity, "folded": failed}))
    assert ["folded", "3.8e-07", "0.930", "2", "0", "208", "FAIL"] in rows(text)
    assert "parity FAILED for folded: NaN or infinity in the output" in text
    assert "FAIL" not in shown(report)


def test_text_is_neither_markup_nor_an_escape_code(report):
    sentence = msgspec.structs.replace(report.sentence, text="[red]x[/red] [/] \x1b]0;title\x07", label="[b]")
    methods = [msgspec.structs.replace(report.methods[0], method="[bold]m[/bold]\x1b[2J")]
    text = shown(msgspec.structs.replace(report, model="[blink]", sentence=sentence, methods=methods))
    assert "[bold]m[/bold]" in "".join(row[0] for row in rows(text))
    assert "[red]x[/red] [/] " in text and "[blink]" in text and "→ [b]" in text
    assert "\x1b" not in text and "\x07" not in text


def test_each_setting_of_spinning_has_its_own_section(report):
    settings = msgspec.structs.replace(report.bench.settings, spinning=["off", "on"])
    more = msgspec.structs.replace(report.bench.results[1], spinning="on", p50_ms=44.0)
    bench = msgspec.structs.replace(report.bench, settings=settings, results=[*report.bench.results, more])
    text = shown(msgspec.structs.replace(report, bench=bench))
    assert text.index("spinning off") < text.index("67.2") < text.index("spinning on") < text.index("44.0")
    assert "spinning" not in shown(report)


def test_a_report_from_before_fusions_were_counted_names_the_fusion_alone(report):
    import msgspec

    old = [msgspec.structs.replace(each, fusions=None) for each in report.bundles]
    found = rows(shown(msgspec.structs.replace(report, bundles=old)))
    assert ["side-op", "0", "36", "20,736", "82,944", "91.1", "ort"] in found
