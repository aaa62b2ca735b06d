"""The table of ``serving.py``, made from its JSON alone."""

from __future__ import annotations

from typing import Any

__all__ = ["TARGETS", "markdown"]

#: What was set out to be reached.
TARGETS = {
    "overhead": "1x16, one client: p50 at most 0.6 ms over the bare session",
    "saturated": "16 clients, 16 adapters: at least 0.9 of the bare session's throughput at the same batch sizes, at "
    "least 3 times that of a server that takes one request at a time",
    "fleet": "1,000 adapters, Zipf traffic for 60 s, adapters added and removed throughout: no error, no wrong answer",
}


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Serving", ""]
    for part, target in TARGETS.items():
        if part not in report["parts"]:
            continue
        measured = report["parts"][part]
        machine = measured["machine"]
        lines += [f"## {part}", "", f"Wanted: {target}.", "", *_ROWS[part](measured["results"]), ""]
        lines += [f"{machine['cpu']}, {machine['cores']} cores, no GPU; load before: {machine['load_1min']:.2f}.", ""]
    return "\n".join(lines)


def _overhead(results: list[dict[str, Any]]) -> list[str]:
    head = ["model", "bare p50 (ms)", "served p50 (ms)", "overhead (ms) [95 % interval]", "served p99 (ms)", "samples"]
    return _markdown(
        head,
        [
            [
                r["model"],
                f"{r['bare_p50_ms']:.2f}",
                f"{r['served_p50_ms']:.2f}",
                f"{r['overhead_ms']:.2f} [{r['overhead_low_ms']:.2f}, {r['overhead_high_ms']:.2f}]",
                f"{r['served_p99_ms']:.2f}",
                str(r["samples"]),
            ]
            for r in results
        ],
    )


def _saturated(results: list[dict[str, Any]]) -> list[str]:
    head = [
        "tokens",
        "requests/s",
        "mean batch",
        "p50 (ms)",
        "over bare [all rounds]",
        "over one by one [all rounds]",
        "bare session, batch 16 over 1",
    ]
    return _markdown(
        head,
        [
            [
                str(r["length"]),
                f"{r['rate']:.0f}",
                f"{r['mean_batch']:.1f}",
                f"{r['p50_ms']:.1f}",
                *(_spread(r[name]) for name in ("over_bare", "over_one_by_one", "bare_16_over_1")),
            ]
            for r in results
        ],
    )


def _fleet(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for r in results:
        changes = ", ".join(f"{count:,} {what}" for what, count in sorted(r["changes"].items()))
        lines += [
            f"{r['adapters']:,} adapters, {r['max_resident']} in memory; {r['requests']:,} requests at "
            f"{r['rate']:.0f}/s in {r['seconds']:.0f} s, from when they should have been sent: p50 {r['p50_ms']:.1f}, "
            f"p95 {r['p95_ms']:.1f}, p99 {r['p99_ms']:.1f}, longest {r['max_ms']:.1f} ms.  Meanwhile {changes}.  "
            f"**{r['errors']} errors, {r['wrong']} wrong answers**, each held against the adapter's own folded graph."
        ]
    return lines


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows)]


_ROWS = {"overhead": _overhead, "saturated": _saturated, "fleet": _fleet}
