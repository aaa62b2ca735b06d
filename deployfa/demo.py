"""The demo: a real pretrained model, real text, every stage, one table at the end.

Each stage is one ``deployfa`` command, printed before it runs and run as that command, in a process of its own: what
the demo shows is what a person would type.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from deployfa.atomic import check_output, write_file
from deployfa.bench import BenchReport
from deployfa.bundle import Bundle
from deployfa.bundle.bundle import versions
from deployfa.errors import DeployfaError
from deployfa.parity import ParityReport
from deployfa.report.demo_report import DemoReport, MethodResult, PlacementCount, Sentence
from deployfa.train import TrainReport

__all__ = ["SENTENCE", "Stage", "run_demo", "stages"]

SENTENCE = "The plot is thin, but the cast is so charming that I left with a smile."
_METHODS = ("head", "vefa", "lora")
_DOMAINS = ("tweets", "amazon", "nyt")
_RECIPE = "minilm"

T = TypeVar("T")
#: Shows a line: the command of the next stage.
Say = Callable[[str], None]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One command of the demo; ``result`` is the file that its JSON goes to."""

    name: str
    command: list[str]
    result: str


def stages(out: Path, *, seed: int = 0) -> list[Stage]:
    """Every command of the demo in order; any of them can be typed alone."""
    data = out / "data"
    shown = [*_fetch(data, seed)]
    for method in _METHODS:
        shifted = [part for name in _DOMAINS for part in ("--ood", f"{name}={data / f'{name}.csv'}")]
        command = ["train", "--recipe", _RECIPE, "--method", method, "--train", str(data / "movies_train.csv")]
        command += ["--eval", str(data / "movies_test.csv"), *shifted, "--seed", str(seed)]
        command += ["--precision", "auto"]
        command += ["--out", str(out / f"{method}.pt"), "--force", "--json"]
        shown.append(Stage(name=f"train {method}", command=command, result=f"train-{method}.json"))
    for bundle, placement in (("folded", "fold"), ("side-op", "side-op")):
        command = ["export", "--adapter", str(out / "vefa.pt"), "--placement", placement]
        command += ["--out", str(out / bundle), "--force", "--json"]
        shown.append(Stage(name=f"export {bundle}", command=command, result=f"export-{bundle}.json"))
    for bundle in ("folded", "side-op"):
        command = ["verify", str(out / bundle), "--data", str(data / "movies_test.csv"), "--max-rows", "200", "--json"]
        shown.append(Stage(name=f"verify {bundle}", command=command, result=f"verify-{bundle}.json"))
    command = ["bench", str(out / "folded"), str(out / "side-op"), "--against", "base", "--shapes", "1x128,8x128"]
    command += [
        "--launches",
        "7",
        "--samples",
        "662",
        "--max-seconds",
        "40",
        "--samples-out",
        str(out / "samples.json"),
        "--force",
        "--json",
    ]
    shown.append(Stage(name="bench", command=command, result="bench.json"))
    shown.append(
        Stage(name="run", command=["run", str(out / "folded"), "--text", SENTENCE, "--json"], result="run.json")
    )
    return shown


def run_demo(out: Path, *, seed: int = 0, force: bool = False, say: Say | None = None) -> DemoReport:
    """Run every stage into ``out`` and write ``report.json`` there.

    A stage's JSON stays beside it.  Raises ``OutputExistsError`` if ``out`` holds a report, unless ``force``, and
    ``DeployfaError`` with the stage's own last line if one fails.
    """
    check_output(out / "report.json", force=force)
    out.mkdir(parents=True, exist_ok=True)
    tell = say or (lambda _: None)
    seconds: dict[str, float] = {}
    for stage in stages(out, seed=seed):
        tell(f"$ deployfa {_quoted(stage.command)}")
        started = time.monotonic()
        _run(stage, out)
        seconds[stage.name] = round(time.monotonic() - started, 1)
    report = _collect(out, seed, seconds)
    with write_file(out / "report.json", force=True) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return report


def _fetch(data: Path, seed: int) -> list[Stage]:
    prepare = ["fetch", "vader", "--out", str(data), "--seed", str(seed), "--train-rows", "6000", "--test-rows", "1500"]
    prepare += ["--force", "--json"]
    return [
        Stage(name="fetch model", command=["fetch", _RECIPE, "--json"], result="fetch-model.json"),
        Stage(name="fetch data", command=prepare, result="fetch-data.json"),
    ]


def _run(stage: Stage, out: Path) -> None:
    """Run the stage's command; its progress goes to the terminal, its JSON to its file."""
    with (out / stage.result).open("wb") as sink:
        finished = subprocess.run(
            [sys.executable, "-m", "deployfa.cli", *stage.command], stdout=sink, check=False, stdin=subprocess.DEVNULL
        )
    # verify exits 1 when parity fails, and its report says why: the demo goes on and shows it
    if finished.returncode not in {0, 1} or (finished.returncode == 1 and not stage.name.startswith("verify")):
        raise DeployfaError(
            f"stage '{stage.name}' of the demo failed (exit status {finished.returncode}), its message stands above; "
            f"repeat it with: deployfa {_quoted(stage.command)}"
        )


def _collect(out: Path, seed: int, seconds: dict[str, float]) -> DemoReport:
    trained = [_read(out / f"train-{method}.json", TrainReport) for method in _METHODS]
    answers = msgspec.json.decode((out / "run.json").read_bytes())["answers"][0]
    return DemoReport(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=_RECIPE,
        seed=seed,
        train_rows=trained[0].train_rows,
        methods=[
            MethodResult(
                method=report.method,
                trainable_parameters=report.trainable_parameters,
                seconds=report.seconds,
                scores={"movies" if name == "eval" else name: scores for name, scores in report.scores.items()},
            )
            for report in trained
        ],
        bundles=[_placements(out / name) for name in ("folded", "side-op")],
        parity={name: _read(out / f"verify-{name}.json", ParityReport) for name in ("folded", "side-op")},
        bench=_read(out / "bench.json", BenchReport),
        sentence=Sentence(text=answers["text"], label=answers["label"], score=answers["score"]),
        stage_seconds=seconds,
        versions=versions(),
    )


def _placements(path: Path) -> PlacementCount:
    manifest = Bundle.open(path).manifest
    edits = manifest.plan["edits"]
    return PlacementCount(
        bundle=path.name,
        folded=sum(edit["placement"] != "side op" for edit in edits),
        side_ops=sum(edit["placement"] == "side op" for edit in edits),
        extra_flops_per_token=sum(edit["extra_flops_per_token"] for edit in edits),
        extra_bytes=sum(edit["extra_bytes"] for edit in edits),
        graph_bytes=manifest.graph.bytes,
        fusion=manifest.optimization.chosen,
        fusions=manifest.fusions,
    )


def _read(path: Path, kind: type[T]) -> T:
    return msgspec.json.decode(path.read_bytes(), type=kind)


def _quoted(words: Sequence[str]) -> str:
    import shlex

    return shlex.join(words)
