"""Timing generation: both sides generate the same, in processes of their own, and ratios come with intervals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest

from deployfa.bench import Shape
from deployfa.bench import protocol as say
from deployfa.errors import InputError, RuntimeTargetError
from deployfa.generation.timing import GenerationContender, _Found, _result, time_generation
from deployfa.generation.timing_report import GenerationBench, GenerationSettings, render
from deployfa.generation.timing_worker import GenerationWorker
from deployfa.pipeline import export

from ..training.tiny_decoders import random_vefa, write_decoder

SETTINGS = GenerationSettings(threads=1, spinning=False, launches=2, rounds=6, new_tokens=4, seed=0, vocabulary=50)
SHAPE = Shape(2, 5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("timed")
    adapter = random_vefa(write_decoder(folder / "model", "llama"))
    return export(adapter, folder / "tiny.bundle", optimize="none").bundle.path


def test_the_command_times_a_bundle_against_pytorch(cli, bundle) -> None:
    flags = "--against torch --shapes 2x5 --new-tokens 4 --launches 1 --samples 11 --threads 1 --json"
    result = cli("bench", bundle, *flags.split())
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    jsonschema.validate(document, msgspec.json.schema(GenerationBench))
    report = msgspec.convert(document, GenerationBench)
    theirs, ours = report.results
    assert (theirs.contender, ours.contender) == ("torch", str(bundle))
    assert ours.same_tokens and theirs.same_tokens and ours.samples == theirs.samples == 11
    for each in (ours, theirs):
        assert each.ttft_ms > 0
        assert each.tokens_per_second == pytest.approx(2e3 / each.token_ms)
    assert theirs.token_ratio is None and ours.token_ratio is not None and ours.ttft_ratio is not None
    # from one launch no verdict
    assert ours.token_ratio.low <= ours.token_ratio.estimate <= ours.token_ratio.high
    assert ours.token_ratio.verdict is None
    assert all(each.peak_memory_bytes for each in report.contenders)
    kept = json.loads((bundle / "manifest.json").read_text())["bench"]
    assert kept["against"] == "torch" and kept["generation"]["2x5 new 4"]["ttft_ms"] == ours.ttft_ms


def found(scale: float, *, tokens: str = "same", rounds: int = 6) -> _Found:
    random = np.random.default_rng(0)
    noise = [list(scale * (10 + random.random(rounds))) for _ in range(2)]
    return _Found(first={SHAPE: noise}, step={SHAPE: noise}, tokens={SHAPE: {tokens}})


def test_ratios_are_of_the_same_rounds_and_the_verdict_follows() -> None:
    slow, fast = found(2.0), found(1.0)
    result = _result("fast", SHAPE, fast, slow, False, SETTINGS)
    assert result.token_ratio is not None and result.token_ratio.estimate == pytest.approx(0.5)
    assert result.token_ratio.verdict == "faster" and result.same_tokens
    assert _result("slow", SHAPE, slow, fast, False, SETTINGS).token_ratio.verdict == "slower"
    assert _result("slow", SHAPE, slow, slow, True, SETTINGS).token_ratio is None
    # other tokens are told
    assert not _result("other", SHAPE, found(1.0, tokens="other"), slow, False, SETTINGS).same_tokens
    # two rounds a launch support nothing
    few = _result("few", SHAPE, found(1.0, rounds=2), found(2.0, rounds=2), False, SETTINGS)
    assert few.token_ratio is None and "3 rounds" in (few.refused or "")


def test_the_table_says_what_was_found() -> None:
    from rich.console import Console

    from deployfa.bench.machine import describe_machine
    from deployfa.generation.timing_report import Generating

    slow = found(2.0)
    times: dict[str, list[float]] = {"start_ms": [], "import_ms": [], "session_ms": []}
    who = [
        Generating(label=label, kind="torch", target="x", bundle=None, peak_memory_bytes=1, **times)
        for label in ("torch", "ours")
    ]
    results = [
        _result("torch", SHAPE, slow, slow, True, SETTINGS),
        _result("ours", SHAPE, found(1.0, tokens="other"), slow, False, SETTINGS),
    ]
    report = GenerationBench(
        machine=describe_machine(), settings=SETTINGS, contenders=who, results=results, warnings=["busy"]
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(report))
    text = console.export_text()
    # the table of the benchmark says the same
    from generation import markdown

    rows = markdown(report).splitlines()
    assert sum("| 2x5 | " in row for row in rows) == 2
    assert any("| ours | " in row and "0.500 [0.500, 0.500]" in row and row.endswith("| no |") for row in rows)
    assert rows[-1] == "Warning: busy"
    assert "0.500 [0.500, 0.500]" in text and "warning: busy" in text and "no" in text and "2x5" in text


def test_a_worker_says_what_is_wrong() -> None:
    worker = GenerationWorker()
    with pytest.raises(RuntimeTargetError, match="before it was told what"):
        worker.answer(say.Generate())
    with pytest.raises(RuntimeTargetError, match="Warm is for another one"):
        worker.answer(say.Warm(1.0))
    worker._generate = lambda prompts, new: ([[1] for _ in prompts], 0.0)
    with pytest.raises(RuntimeTargetError, match="1 tokens where 4"):
        worker.answer(say.PreparePrompts(1, 3, 4, 0, 50))


def test_wrong_arguments_are_refused_before_anything_starts() -> None:
    one = GenerationContender("one", bundle=Path("none"))
    for contenders, shapes, more in (
        ([], [SHAPE], {}),
        ([one, one], [SHAPE], {}),
        ([one], [], {}),
        ([one], [SHAPE], {"new_tokens": 1}),
        ([one], [SHAPE], {"rounds": 0}),
    ):
        with pytest.raises(InputError, match=r"; (give|pass) "):
            time_generation(contenders, shapes, **more)


def test_a_contender_that_is_not_there_is_an_error(tmp_path) -> None:
    with pytest.raises(RuntimeTargetError, match=r"contender 'none': .*is not a bundle"):
        time_generation([GenerationContender("none", bundle=tmp_path)], [SHAPE])
