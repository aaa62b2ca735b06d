"""``deployfa run`` of bundles that generate, made by ``export``, ``export --slots`` and ``pack``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.cli.run_generation import GenerationReport, read_prompts
from deployfa.errors import BundleError, DataError
from deployfa.generation.generator import Generator, Request, open_generator
from deployfa.generation.options import Options
from deployfa.pack import pack
from deployfa.pipeline import export
from deployfa.slots import export_slots

from ..training.tiny_decoders import random_vefa, write_decoder

PROMPTS = ("The film was", "A joy from start to")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Adapter]:
    folder = write_decoder(tmp_path_factory.mktemp("decoder") / "model", "llama")
    return {name: random_vefa(folder, seed=seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def made(adapters, tmp_path_factory) -> dict[str, Path]:
    """Bundles of each kind, and an adapter file that fits the slots."""
    folder = tmp_path_factory.mktemp("bundles")
    one, two = adapters.values()
    export(one, folder / "folded", optimize="none")
    export_slots(one, folder / "slots", optimize="none")
    pack(adapters, folder / "pack", table_inputs=True)
    two.save(folder / "two.safetensors")
    return {name: folder / name for name in ("folded", "slots", "pack", "two.safetensors")}


@pytest.fixture(scope="module")
def alone(made) -> Generator:
    """Of the first adapter."""
    return open_generator(Bundle.open(made["folded"]))


def refused(cli, *arguments: object) -> str:
    result = cli("run", *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    return str(line)


def answers(cli, *arguments: object) -> list[dict[str, Any]]:
    result = cli("run", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    jsonschema.validate(document, msgspec.json.schema(GenerationReport))
    assert document["tokens_per_second"] > 0
    return list(document["answers"])


def both() -> list[object]:
    return [part for prompt in PROMPTS for part in ("--prompt", prompt)]


def test_one_prompt_is_streamed(cli, made, alone) -> None:
    result = cli("run", made["folded"], "-p", PROMPTS[0], "--max-new-tokens", 12)
    assert result.returncode == 0 and result.stderr == ""
    (wanted,) = alone.generate([Request(prompt=PROMPTS[0], options=Options(max_new_tokens=12))])
    assert result.stdout == wanted.text + "\n"


def test_several_prompts_are_printed_as_they_end(cli, made, alone) -> None:
    result = cli("run", made["folded"], *both(), "--max-new-tokens", 8)
    for number, completion in enumerate(alone.generate([Request(prompt=each) for each in PROMPTS])):
        assert f"[{number + 1}] {PROMPTS[number]}\n" in result.stdout
        assert completion.text[:3] in result.stdout


def test_json_tells_tokens_and_why_they_end(cli, made, alone, tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n\n")
    options = Options(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, max_new_tokens=9)
    flags = ("--temperature", 0.9, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1)
    found = answers(cli, made["folded"], "--prompts", file, *flags, "--max-new-tokens", 9, "--seed", 5)
    for number, each in enumerate(found):
        own = msgspec.structs.replace(options, seed=5 + number)
        (wanted,) = alone.generate([Request(prompt=PROMPTS[number], options=own)])
        assert (each["prompt"], each["text"]) == (PROMPTS[number], wanted.text)
        assert each["token_ids"] == wanted.token_ids and each["finish"] == wanted.finish == "length"
        assert each["ttft_ms"] > 0 and each["adapter"] is None
    stop = next(c for c in found[0]["text"] if c.isalnum())
    (stopped, _) = answers(
        cli, made["folded"], "--prompts", file, *flags, "--max-new-tokens", 9, "--seed", 5, "--stop", stop
    )
    assert stopped["finish"] == "stop string" and stopped["text"] == found[0]["text"].split(stop)[0]


def test_a_pack_answers_each_prompt_with_its_adapter(cli, made, alone) -> None:
    wanted = [each.token_ids for each in alone.generate([Request(prompt=each) for each in PROMPTS])]
    mixed = answers(cli, made["pack"], *both(), "-a", "one", "-a", "two")
    assert [each["adapter"] for each in mixed] == ["one", "two"]
    assert mixed[0]["token_ids"] == wanted[0] and mixed[1]["token_ids"] != wanted[1]
    same = answers(cli, made["pack"], *both(), "-a", "one", "--strength", 1.0)
    assert [each["token_ids"] for each in same] == wanted
    weak = answers(cli, made["pack"], *both(), "-a", "one", "--strength", 0.0)
    assert weak[0]["token_ids"] != wanted[0]


def test_slots_take_a_file(cli, made, alone) -> None:
    own = answers(cli, made["slots"], *both())
    assert [each["token_ids"] for each in own] == [
        each.token_ids for each in alone.generate([Request(prompt=each) for each in PROMPTS])
    ]
    pack = open_generator(Bundle.open(made["pack"]))
    for name, given in (("two", made["two.safetensors"]), ("base", "none")):
        found = answers(cli, made["slots"], *both(), "-a", given)
        wanted = pack.generate([Request(prompt=prompt, adapter=name) for prompt in PROMPTS])
        assert [each["token_ids"] for each in found] == [each.token_ids for each in wanted]


def test_a_chat_template_is_applied_on_demand_only(cli, made, alone) -> None:
    (plain,) = answers(cli, made["folded"], "-p", "Why?")
    (chat,) = answers(cli, made["folded"], "-p", "Why?", "--chat")
    (wanted,) = alone.generate([Request(prompt="user: Why?\nbot:", special=False)])
    assert chat["token_ids"] == wanted.token_ids != plain["token_ids"] and chat["prompt"] == "Why?"


def test_what_does_not_fit_is_one_line(cli, made, bundles, tmp_path) -> None:
    folded, prompt = made["folded"], ("--prompt", "x")
    assert 'pass --prompt "..." or --prompts FILE' in refused(cli, folded)
    assert "pass --prompt or --prompts instead" in refused(cli, folded, "--text", "x")
    assert "leave --prompt and what goes with it out" in refused(cli, bundles["folded"], *prompt)
    assert "leave --adapter" in refused(cli, folded, *prompt, "--strength", "0.5")
    assert "3 adapters for 2 prompts" in refused(cli, made["pack"], *both(), "-a", "one", "-a", "two", "-a", "one")
    assert "pass --max-new-tokens 95, or shorten" in refused(cli, folded, *prompt, "--max-new-tokens", 500)
    assert "generation runs in ONNX Runtime" in refused(cli, folded, *prompt, "--target", "tensorrt-rtx")


def test_prompts_from_files(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["one\ntwo"]
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", " two"]
    for content in (b"\n", b"\xff"):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(DataError):
            read_prompts(tmp_path / "a.txt")
    with pytest.raises(DataError):
        read_prompts(tmp_path / "none.txt")


def test_a_bundle_that_classifies_is_no_generator(bundles) -> None:
    with pytest.raises(BundleError, match="is for text-classification"):
        open_generator(Bundle.open(bundles["folded"]))


def test_prompts_are_lines_as_an_editor_counts_them(tmp_path) -> None:
    from deployfa.cli.run_generation import read_prompts

    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffHello\u2028again\r\nB\n\n".encode())
    assert read_prompts(file) == ["Hello\u2028again", "B"]


def test_options_that_mean_nothing_are_not_ignored(cli, made, bundles) -> None:
    assert "leave --prompt and what goes with it out" in refused(
        cli, bundles["folded"], "--text", "x", "--temperature", "0.5"
    )
    done = cli("bench", made["folded"], "--against", "torch", "--max-seconds", "5")
    assert done.returncode == 2
    assert "leave --max-seconds out" in done.stderr
    done = cli("verify", made["folded"], "--no-torch", "--new-tokens", "4")
    assert done.returncode == 2
    assert "leave it out" in done.stderr
