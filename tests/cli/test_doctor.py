"""``deployfa doctor``: what it prints, and what its exit status means."""

from __future__ import annotations

import json

import jsonschema
import msgspec
import pytest

from deployfa.doctor import DoctorReport, known_targets
from deployfa.runtimes.probe import DEVICES, probe


@pytest.fixture(scope="module")
def no_gpu() -> None:
    if probe(DEVICES).ok:
        pytest.skip("this machine has a GPU")


def test_json_fits_its_schema(cli) -> None:
    result = cli("doctor", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    schema = msgspec.json.schema(DoctorReport)
    jsonschema.validate(document, schema)
    assert tuple(state["target"] for state in document["targets"]) == known_targets()
    document["targets"][0]["run"]["yes"] = "perhaps"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_the_tables_name_every_target_and_every_reason(cli, no_gpu) -> None:
    result = cli("doctor")
    assert result.returncode == 0, result.stderr
    for target in known_targets():
        assert target in result.stdout
    assert "no NVIDIA GPU found" in result.stdout
    assert "tensorrt-rtx cannot be run here: no NVIDIA GPU found" in result.stdout
    assert "onnxruntime-cpu cannot" not in result.stdout


@pytest.mark.parametrize(("target", "status"), [("onnxruntime-cpu", 0), ("tensorrt-rtx", 1), ("onnxruntime-cuda", 1)])
def test_the_exit_status_answers_for_one_target(cli, no_gpu, target: str, status: int) -> None:
    result = cli("doctor", "--target", target)
    assert result.returncode == status, result.stdout + result.stderr
    assert (f"{target} cannot be run here: " in result.stdout) == (status == 1)
    assert (cli("doctor", "--target", target, "--json").returncode) == status


def test_a_target_that_there_is_not_is_an_error_and_no_answer(cli) -> None:
    result = cli("doctor", "--target", "cuda")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("error: no target 'cuda'; targets: onnxruntime-cpu, ")


def test_help_says_what_the_status_means(cli) -> None:
    text = " ".join(cli("doctor", "--help").stdout.split())
    assert "Exit 0; with --target 0 if it runs here and 1 if it does not" in text.replace("│ ", "")
