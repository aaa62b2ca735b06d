"""The demo's stages are commands that a person can type; the whole demo is run by ``make demo``."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deployfa.demo import Stage, run_demo, stages
from deployfa.errors import DeployfaError, OutputExistsError
from deployfa.report.demo_report import DemoReport
from deployfa.report.page import read_report, write_page


def test_every_stage_is_a_command_with_options_that_exist() -> None:
    """Parsed by the real application, without running the command."""
    from typer.main import get_command

    from deployfa.cli.app import app

    group = get_command(app)
    for stage in stages(Path("out")):
        name, *arguments = stage.command
        command = group.commands[name]
        context = command.make_context(name, list(arguments))
        assert context.params["json"] is True, stage.name


def test_nothing_starts_when_a_report_is_there(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(OutputExistsError):
        run_demo(tmp_path, say=lambda line: pytest.fail(f"started {line}"))


def test_a_failing_stage_says_how_to_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Stage(name="inspect", command=["inspect", str(tmp_path / "no.pt"), "--json"], result="x.json")
    monkeypatch.setattr("deployfa.demo.stages", lambda out, seed: [broken])
    with pytest.raises(DeployfaError, match=r"stage 'inspect'.*repeat it with: deployfa inspect"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
def test_the_whole_demo_on_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage for real; only sizes are cut: fewer rows, one epoch, a short bench."""
    original = stages

    def smaller(out: Path, *, seed: int) -> list[Stage]:
        cut = {
            "--train-rows": "64",
            "--test-rows": "32",
            "--samples": "11",
            "--launches": "2",
            "--max-seconds": "2",
            "--max-rows": "32",
        }
        changed = []
        for stage in original(out, seed=seed):
            words = list(stage.command)
            for option, value in cut.items():
                if option in words:
                    words[words.index(option) + 1] = value
            if words[0] == "train":
                words += ["--epochs", "1"]
            if words[0] == "export":
                words += ["--optimize", "none"]
            changed.append(msgspec.structs.replace(stage, command=words))
        return changed

    monkeypatch.setattr("deployfa.demo.stages", smaller)
    report = run_demo(tmp_path / "demo")
    assert read_report(tmp_path / "demo" / "report.json") == report
    assert [method.method for method in report.methods] == ["head", "vefa", "lora"]
    assert set(report.methods[0].scores) == {"movies", "tweets", "amazon", "nyt"}
    assert set(report.parity) == {"folded", "side-op"}
    assert [contender.label for contender in report.bench.contenders] == ["base", "folded", "side-op"]
    assert report.sentence.label in {"negative", "positive"}
    assert {bundle.bundle: bundle.side_ops for bundle in report.bundles} == {"folded": 0, "side-op": 36}
    page = write_page(report, tmp_path / "demo" / "report.html")
    assert "21,506" in page.read_text(encoding="utf-8"), "the trainable parameters of VeFA"
    msgspec.json.decode((tmp_path / "demo" / "report.json").read_bytes(), type=DemoReport)
