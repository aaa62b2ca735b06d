"""Some hundred of the requests of ``benchmarks/serve_fuzz.py``, and that what it looks for would be found."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from serve_fuzz import READ_S, Generator, Outcome, Sent, fuzz, judge, markdown, send

from deployfa.bundle import Bundle
from deployfa.mixed import MixedRunner

ROOT = Path(__file__).resolve().parents[2]


def test_every_malformed_request_gets_a_4xx_and_every_right_one_its_answer(serve, packs: dict[str, Path]) -> None:
    runner = MixedRunner(Bundle.open(packs["pack"]))

    def truth(feeds, name):
        wanted = {spec.name: feeds[spec.name] for spec in runner.inputs}
        logits = runner.run(wanted, [name])["logits"][0]
        return logits[np.isfinite(logits)]

    generator = Generator("pack", ["vefa", "lorfa"], 30_522, truth, seed=1)
    outcome = Outcome()
    with serve(f"pack={packs['pack']}", "--read-timeout", READ_S) as served:
        asyncio.run(fuzz(served.address[1], generator, 700, outcome))
        assert served.process.poll() is None
    assert not outcome.violations, outcome.violations[:5]
    assert len(outcome.statuses) > 25 and outcome.statuses["right"]["200"] > 40


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        (500, b'{"error": "x"}', "500"),
        (200, b'{"outputs": []}', "200"),
        (400, b"<html>", "no JSON"),
        (400, b'{"message": "x"}', "no JSON"),
        (None, b"", "no answer"),
        (404, b'{"error": "x"}', None),
    ],
)
def test_what_a_malformed_request_must_not_get(status: int | None, body: bytes, found: str | None) -> None:
    wrong = judge(Sent("x", (b"",)), status, body)
    assert wrong is None if found is None else found in (wrong or "")


@pytest.mark.parametrize(
    ("status", "data", "right"), [(200, [1.0, 2.0], True), (200, [2.0, 1.0], False), (400, [1.0, 2.0], False)]
)
def test_a_right_request_must_get_its_own_numbers(status: int, data: list[float], right: bool) -> None:
    sent = Sent("right", (b"",), right=np.array([1.0, 2.0], np.float32))
    body = json.dumps({"outputs": [{"name": "logits", "data": data}]}).encode()
    assert (judge(sent, status, body) is None) is right


def test_a_server_that_hangs_up_is_found() -> None:
    async def main() -> Outcome:
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        outcome, sent = Outcome(), Sent("x", (b"POST / HTTP/1.1\r\n\r\n",))
        outcome.add(sent, *await send(server.sockets[0].getsockname()[1], sent))
        server.close()
        return outcome

    assert asyncio.run(main()).violations == ["x: no answer"]


def test_the_committed_table_is_made_from_its_figures() -> None:
    folder = ROOT / "benchmarks" / "results"
    report = json.loads((folder / "serve_fuzz.json").read_text(encoding="utf-8"))
    assert (folder / "serve_fuzz.md").read_text(encoding="utf-8") == markdown(report)
    assert report["requests"] == 10_000 and not report["violations"]
