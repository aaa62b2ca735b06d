"""README and ARCHITECTURE say what is true: every command runs, the Python runs, the drawing is the layout."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_command_is_of_a_kind_that_is_checked_here() -> None:
    assert {words[0] for words in commands()} == {"make", "pip", "deployfa", "curl"}


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "make"], ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    """What they do is what this suite (make test) and tests/test_demo.py (make demo) run."""
    planned = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "pip"], ids=" ".join)
def test_extras_exist(words: list[str]) -> None:
    (extra,) = re.findall(r"deployfa\[(\w+)\]", words[-1])
    assert extra in PROJECT["project"]["optional-dependencies"]


def curl(words: list[str], folder: Path) -> bytes:
    """What curl prints; a machine may lack it."""
    method, headers, data, url = None, {}, None, ""
    arguments = iter(words)
    for word in arguments:
        if word == "-X":
            method = next(arguments)
        elif word == "-H":
            name, _, value = next(arguments).partition(": ")
            headers[name] = value
        elif word in ("-d", "--data-binary"):
            given = next(arguments)
            data = (folder / given[1:]).read_bytes() if given[0] == "@" else given.encode()
        else:
            url = f"http://{word}"
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)) as answer:
        return answer.read()


@contextlib.contextmanager
def in_background(words: list[str], folder: Path) -> Iterator[None]:
    """A server that is ready, and stopped at the end."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "deployfa.cli", *words], cwd=folder, stderr=log)
        try:
            until = time.monotonic() + 60
            while True:
                assert process.poll() is None and time.monotonic() < until, (folder / "server.log").read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen("http://localhost:8000/v2/health/ready"):
                    break
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            assert process.wait(30) == 0


def cut(folder: Path) -> None:
    """Leave 64 rows of every file of data."""
    for file in (folder / "data").glob("*.csv"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:65]), encoding="utf-8")
    for file in (folder / "digits").glob("*.npz"):
        with np.load(file) as found:
            kept = {name: found[name][:64] for name in found.files}
        np.savez_compressed(file, **kept)


@pytest.mark.timeout(1500)  # every command of the README, one after another
@pytest.mark.slow
def test_every_deployfa_command_runs(tmp_path: Path, minilm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as written, in one folder; only the data is cut to a few rows once it is there, and then the Python."""
    assert minilm_dir.is_dir()
    behind = contextlib.ExitStack()
    for words in (w for w in commands() if w[0] in ("deployfa", "curl")):
        if words[0] == "curl":
            assert curl(words[1:], tmp_path), shlex.join(words)
            continue
        if words[-1] == "&":
            behind.enter_context(in_background(words[1:-1], tmp_path))
            continue
        result = subprocess.run(
            [sys.executable, "-m", "deployfa.cli", *words[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}\n{result.stderr}"
        if words[1] == "fetch":
            cut(tmp_path)
    behind.close()
    monkeypatch.chdir(tmp_path)
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {"MODEL": str(minilm_dir)})
    assert (tmp_path / "mine.safetensors").is_file()


def test_the_figures_are_those_of_the_committed_run() -> None:
    from deployfa.report.markdown import render
    from deployfa.report.page import read_report

    (shown,) = re.findall(r"<!-- demo -->\n(.*?)\n<!-- /demo -->", README, re.DOTALL)
    assert shown == render(read_report(ROOT / "benchmarks" / "results" / "demo.json"))


def test_the_drawing_is_the_layout() -> None:
    """The rooms in ARCHITECTURE.md, top to bottom, are the layers that the import linter enforces."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    (drawing,) = [block for block in re.findall(r"```text\n(.*?)```", text, re.DOTALL) if block.startswith("cli ")]
    drawn = [re.split(r"\s{2,}", line)[0] for line in drawing.splitlines()]
    (contract,) = [c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    assert drawn == [re.sub(r"[()]", "", layer) for layer in contract["layers"]]


def test_the_changelog_has_this_version_or_an_unreleased_part() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{PROJECT['project']['version']}]" in changelog


def test_no_path_of_a_developer_machine_is_in_the_docs() -> None:
    for file in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not re.search(r"(/home/|/root/|/work/|/tmp/)", text), file
