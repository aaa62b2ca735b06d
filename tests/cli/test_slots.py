"""Slots on the command line: export, convert, run, inspect, verify; and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from deployfa.cli.export import ExportReport
from deployfa.inspection import Inspection
from deployfa.parity import ParityReport
from deployfa.predict import RunReport

Trained = dict[str, Path]


@pytest.fixture(scope="module")
def few(shared: Path) -> Path:
    """Enough texts for a reference; the built-in ones take longer."""
    file = shared / "few.csv"
    texts = [f"This is sentence number {number}, and it is {'good' if number % 2 else 'bad'}." for number in range(40)]
    file.write_text("text\n" + "\n".join(f'"{text}"' for text in texts) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def exported(cli, shared: Path, trained: Trained, few: Path) -> Path:
    """The VeFA with slots, and what the command printed beside it."""
    out = shared / "cli-slots"
    with FileLock(shared / "cli-slots.lock"):
        if not out.is_dir():
            given = ("--slots", "--max-labels", "3", "--optimize", "none", "--data", few, "--json")
            result = cli("export", "-a", trained["vefa"], *given, "-o", out)
            assert result.returncode == 0, result.stderr
            (shared / "cli-slots.json").write_text(result.stdout, encoding="utf-8")
    return out


@pytest.fixture
def other(cli, trained: Trained, exported: Path, tmp_path: Path) -> Path:
    """Half the VeFA, as an ``.onnx_adapter``."""
    out = tmp_path / "half.onnx_adapter"
    given = ("--to", "onnx-adapter", "--bundle", exported, "--strength", "0.5")
    result = cli("convert", trained["vefa"], *given, "-o", out)
    assert result.returncode == 0, result.stderr
    assert f"deployfa run {exported} --adapter" in result.stderr.replace("\n", " ")
    return out


def scores(cli, *arguments: object) -> dict[str, float]:
    result = cli("run", *arguments, "--text", "A joy from start to finish.", "--json")
    assert result.returncode == 0, result.stderr
    (answer,) = msgspec.json.decode(result.stdout, type=RunReport).answers
    return answer.scores


def refused(cli, *arguments: object) -> str:
    result = cli(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("·")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    return lines[0]


def test_export_tells_in_json_what_the_slots_are(exported: Path) -> None:
    report = msgspec.json.decode(exported.with_name("cli-slots.json").read_bytes(), type=ExportReport)
    slots = report.manifest["slots"]
    assert (slots["idle_branch"], slots["exact"], slots["file"]) == (True, True, "adapter.onnx_adapter")
    assert report.manifest["optimization"]["chosen"] == slots["active"]["chosen"] == "none"


def test_export_prints_what_the_slots_are(cli, trained: Trained, few: Path, tmp_path: Path) -> None:
    given = ("--slots", "--no-idle-branch", "--optimize", "none", "--data", few)
    result = cli("export", "-a", trained["head"], *given, "-o", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert "0 edits in 2 inputs of 3.1 KB; without an adapter the bundle runs themselves" in result.stdout
    assert "Fusions tried" in result.stdout


def test_run_with_its_own_another_and_none(cli, exported: Path, other: Path, trained: Trained, bundles) -> None:
    own = scores(cli, exported)
    assert own == pytest.approx(scores(cli, bundles["folded"]), abs=1e-5)
    half, none = scores(cli, exported, "-a", other), scores(cli, exported, "-a", "none")
    assert len({json.dumps(each) for each in (own, half, none)}) == 3
    assert scores(cli, exported, "-a", trained["vefa"]) == own
    assert scores(cli, exported, "-a", trained["vefa"], "--strength", "0.5") == pytest.approx(half, abs=1e-6)
    shown = cli("run", exported, "-a", other, "--text", "A joy.").stdout
    assert shown.split()[0] in {"negative", "positive"}


def test_verify_and_inspect(cli, exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    result = cli("verify", copy, "--no-torch", "--json")
    assert result.returncode == 0, result.stderr
    assert msgspec.json.decode(result.stdout, type=ParityReport).stages[0].name == "no adapter, as deployed"
    assert "no adapter, as deployed" in cli("verify", copy, "--no-torch").stdout
    found = msgspec.json.decode(cli("inspect", copy, "--json").stdout, type=Inspection)
    assert found.slots is not None
    assert (found.slots.max_labels, found.slots.max_rank, found.slots.idle_branch) == (3, 0, True)
    assert "without an adapter it runs the base graph beside them" in " ".join(cli("inspect", copy).stdout.split())


@pytest.mark.slow
def test_verify_another_adapter(cli, exported: Path, other: Path, few: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    before = (copy / "manifest.json").read_bytes()
    result = cli("verify", copy, "--adapter", other, "--data", few, "--json")
    assert result.returncode == 0, result.stderr
    report = msgspec.json.decode(result.stdout, type=ParityReport)
    assert report.adapter == str(other) and report.passed
    assert (copy / "manifest.json").read_bytes() == before, "the manifest keeps what is of the bundle's own"
    shown = cli("verify", copy, "--adapter", other, "--data", few)
    assert "half.onnx_adapter'" in "".join(shown.stdout.split()) and "PASS" in shown.stdout


def test_verify_another_adapter_refused(cli, exported: Path, other: Path, bundles, trained: Trained) -> None:
    assert "leave --no-torch out" in refused(cli, "verify", exported, "-a", other, "--no-torch")
    assert "no place for 'A' here" in refused(cli, "verify", exported, "-a", trained["lorfa"])
    assert "only with --patch, or for a bundle with slots" in refused(
        cli, "verify", bundles["folded"], "-a", trained["vefa"]
    )
    assert "leave it out" in refused(cli, "verify", exported, "--allow-base-mismatch")
    other.write_bytes(other.read_bytes()[:-100])
    assert "or a damaged one; convert the adapter again" in refused(cli, "verify", exported, "-a", other)


def test_bench_times_it_idle(cli, exported: Path) -> None:
    result = cli("bench", exported, "--shapes", "1x8", "--max-seconds", "2", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["results"]


def test_options_that_say_nothing_together(cli, trained: Trained, exported: Path, tmp_path: Path) -> None:
    out, vefa = tmp_path / "out", trained["vefa"]
    for given, message in (
        (("--max-rank", "4"), "are for --slots; add it"),
        (("--no-idle-branch",), "are for --slots; add it"),
        (("--slots", "--delta", out), "pass either"),
        (("--slots", "--require-fold"), "leave out the options that say where edits go"),
        (("--slots", "--placement", "fold"), "leave out the options that say where edits go"),
    ):
        assert message in refused(cli, "export", "-a", vefa, *given, "-o", out)
    convert = ("convert", vefa, "--to")
    assert "--bundle BUNDLE go together" in refused(cli, *convert, "onnx-adapter", "-o", tmp_path / "x.onnx_adapter")
    assert "--bundle BUNDLE go together" in refused(cli, *convert, "pt", "--bundle", exported, "-o", tmp_path / "x.pt")
    assert "a name that ends in .onnx_adapter" in refused(
        cli, *convert, "onnx-adapter", "--bundle", exported, "-o", tmp_path / "x.pt"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_one_line(cli, trained: Trained, exported: Path, bundles, other: Path) -> None:
    out = other.with_name("x.onnx_adapter")
    given = ("--to", "onnx-adapter", "-o", out, "--bundle")
    line = refused(cli, "convert", trained["lorfa"], *given, exported)
    assert "has no place for 'A' here, only for: lambda; export this adapter with --slots" in line
    assert "export it with --slots" in refused(cli, "convert", trained["vefa"], *given, bundles["folded"])
    text = ("--text", "ok")
    assert "slots hold one adapter at a time" in refused(cli, "run", exported, "-a", other, "-a", "none", *text)
    assert "leave --adapter and --strength out" in refused(cli, "run", bundles["folded"], "-a", other, *text)
    assert "none is active" in refused(cli, "run", exported, "-a", "none", "--strength", "0.5", *text)
    assert "is not between 0" in refused(cli, "run", exported, "--strength", "7", *text)
    other.write_bytes(other.read_bytes()[:-100])
    assert "or a damaged one; convert the adapter again" in refused(cli, "run", exported, "-a", other, *text)
    assert not out.exists()
