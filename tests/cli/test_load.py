"""``deployfa load`` as a person runs it: what it prints, its exit status, its one-line refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import msgspec
import pytest

from deployfa.cli.load import _print
from deployfa.load import LoadReport, RateReport

from ..load.server import Server, serving

Cli = Callable[..., subprocess.CompletedProcess[str]]
QUICK = ("--rate", 200, "--duration", 0.3, "--warmup", 0)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as up:
        yield up


def check(text: str, kind: type) -> dict:
    document = json.loads(text)
    schema = msgspec.json.schema(kind)
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "model": 1}, schema)
    return document


def test_json_and_out_are_the_report(cli: Cli, server: Server, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    result = cli("load", server.url, *QUICK, "--slo-ms", 1000, "--out", out, "--json")
    assert result.returncode == 0, result.stderr
    found = check(result.stdout, LoadReport)
    assert found["sent"] == found["ok"] > 0 and found["objective"]["share"] == 1
    assert json.loads(out.read_text()) == found
    again = cli("load", server.url, *QUICK, "--out", out)
    assert again.returncode == 2 and "--force" in again.stderr


def test_the_table(cli: Cli, server: Server) -> None:
    server.behave, server.after = "busy", 30
    result = cli("load", server.url, *QUICK, "--slo-ms", 1000, "--fail-on-error")
    assert result.returncode == 1
    for part in (
        "minilm: 200 requests a second",
        "HTTP 503",
        "goodput (1/s)",
        "p99.9 needs 6,636",
        "toy 1.0",
        "seed 0",
    ):
        assert part in result.stdout


def test_what_is_shed_fails_nothing(cli: Cli, server: Server) -> None:
    server.behave = "shed"
    assert cli("load", server.url, *QUICK, "--fail-on-error").returncode == 0


def test_find_rate(cli: Cli, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.serial = 0.005
    search = ("--slo-ms", 200, "--slo-quantile", 0.5, "--find-rate")
    result = cli("load", server.url, "--rate", 100, "--duration", 0.2, "--warmup", 0, *search, "--json")
    assert result.returncode == 0, result.stderr
    found = check(result.stdout, RateReport)
    assert found["found_per_s"] < found["limit_per_s"] and len(found["steps"]) >= 8
    report = msgspec.json.decode(result.stdout, type=RateReport)
    _print(report, out=None, force=False, json=False)
    printed = capsys.readouterr().out
    for part in ("p50 within 200 ms", "verdict", "late", "are within the objective", "(limited by the"):
        assert part in printed


def test_ctrl_c_reports_what_was_measured(server: Server) -> None:
    command = [sys.executable, "-m", "deployfa.cli", "load", server.url, "--warmup", "0", "--rate", "100", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while server.asked < 40 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    found = check(out, LoadReport)
    assert found["interrupted"] and 0 < found["seconds"] < 30 and found["ok"] >= 35 and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--rate", 0), "--rate 0 is not above 0"),
        (("--adapters", "zipf:x"), "zipf:1.1:1000"),
        (("--text", "a", "--tokens", 4), "leave out --tokens"),
        (("--model", "bert"), "no model 'bert'"),
        (("--find-rate",), "pass --slo-ms"),
    ],
)
def test_refusals_are_one_line(cli: Cli, server: Server, arguments: tuple[object, ...], part: str) -> None:
    result = cli("load", server.url, *arguments)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and part in line
    assert server.asked == 0


def test_without_aiohttp(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "aiohttp.py").write_text("raise ImportError\n")
    result = cli("load", "localhost:1", env={"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])})
    assert result.returncode == 2
    assert result.stderr == (
        "error: sending load needs aiohttp, which is not installed; run: pip install 'deployfa[serve]'\n"
    )


def test_the_command_line_loads_neither_aiohttp_nor_numpy() -> None:
    code = "import sys, deployfa.cli.app; print(*{'aiohttp', 'numpy', 'uvloop', 'deployfa.load'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
