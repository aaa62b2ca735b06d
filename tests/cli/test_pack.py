"""``deployfa pack``, and ``run`` on what it writes: names, JSON, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import pytest

from deployfa.adapter import Adapter
from deployfa.cli.pack import PackReport
from deployfa.predict import RunReport
from deployfa.tables import open_fleet


@pytest.fixture
def folder(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A directory of two adapters, one of them a PEFT directory with a dot in its name."""
    made = tmp_path / "adapters"
    made.mkdir()
    shutil.copyfile(trained["vefa"], made / "vefa.pt")
    Adapter.load(trained["lora"]).save(tmp_path / "lora")
    (tmp_path / "lora").rename(made / "lora.v1")
    return made


def test_pack_and_run(cli, folder: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "pack"
    words = ("--optimize", "none", "--table-inputs", "--check", "2", "--json")
    packed = cli("pack", folder, f"again={trained['vefa']}", "--out", out, *words)
    assert packed.returncode == 0, packed.stderr
    report = json.loads(packed.stdout)
    jsonschema.validate(report, msgspec.json.schema(PackReport))
    names = [adapter["name"] for adapter in report["manifest"]["tables"]["adapters"]]
    assert names == ["base", "vefa", "lora.v1", "again"]
    assert report["checked"] == ["vefa", "again"], "spread over all, the first and the last among them"
    fleet = open_fleet(out / "adapters.safetensors")
    assert fleet.layout.row_bytes == report["row_bytes"]
    assert all(np.array_equal(table[1], table[3]) for table in fleet.arrays.values())

    texts = ("--text", "A joy.", "--text", "A joy.")
    ran = cli("run", out, *texts, "--adapter", "vefa", "--adapter", "again", "--json")
    answers = json.loads(ran.stdout)
    jsonschema.validate(answers, msgspec.json.schema(RunReport))
    assert [answer["adapter"] for answer in answers["answers"]] == ["vefa", "again"]
    assert answers["answers"][0]["scores"] == answers["answers"][1]["scores"]
    shown = cli("run", out, *texts, "--adapter", "lora.v1")
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["lora.v1", "lora.v1"]

    data = tmp_path / "few.csv"
    data.write_text("text\n" + "\n".join(f"This is sentence {number}." for number in range(40)), encoding="utf-8")
    verified = cli("verify", out, "--adapter", f"again={trained['vefa']}", "--data", data, "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["adapter"] == "again"

    for words, says in (
        (("run", out, *texts), "name the adapter that answers with --adapter; there are: base, vefa, lora.v1, again"),
        (("run", out, *texts, "-a", "lora"), "no adapter 'lora' in this pack; there are: lora.v1"),
        (("run", out, *texts, "-a", "vefa", "--strength", "2"), "not between 0, the base, and 1"),
        (("verify", out, "--torch"), "--no-torch and no --data, or name one of its adapters: --adapter NAME=FILE"),
        (("verify", out, "--no-torch", "-a", trained["vefa"]), "leave --no-torch out"),
        (("verify", out, "-a", f"shop={trained['vefa']}"), "adapter 'shop' is not in the table"),
        (("verify", out, "-a", folder), "holds 2 adapters; name one of them: --adapter NAME=FILE"),
        (("bench", out, "--against", "base"), "is a pack; bench it against a bundle of one adapter"),
        (("pack", folder, "--out", out), f"'{out}' exists; pass --force"),
    ):
        refused = cli(*words)
        assert refused.returncode == 2, refused.stderr
        assert says in refused.stderr and "Traceback" not in refused.stderr


def test_what_cannot_be_named_is_refused(cli, folder: Path, tmp_path: Path) -> None:
    out, vefa = tmp_path / "out", folder / "vefa.pt"
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, says in (
        ((vefa, vefa), "two adapters are called 'vefa'"),
        ((f"base={vefa}",), "'base'"),
        ((empty,), "holds no adapters"),
        ((tmp_path / "nothing.pt",), "no adapter at"),
        ((f"a={tmp_path / 'nothing.pt'}",), "no adapter at"),
        ((vefa, "--check", "0"), "greater than or equal to 1"),
        ((vefa, "--optimize", "fastest"), "no fusion 'fastest'"),
    ):
        refused = cli("pack", *words, "--out", out)
        assert refused.returncode == 2, refused.stderr
        assert says in refused.stderr and "Traceback" not in refused.stderr
        assert not out.exists()
