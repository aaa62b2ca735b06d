"""From a checkpoint that PEFT alone wrote to a verified bundle: IA3 of both kinds on the real MiniLM."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from peft import IA3Config, get_peft_model


@pytest.mark.slow
def test_an_ia3_checkpoint_becomes_a_verified_bundle(cli, minilm_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(minilm_dir), num_labels=2)
    config = IA3Config(
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "ia3")
    for placement in ("auto", "side-op"):
        bundle = tmp_path / placement
        made = cli(
            *("export", "-a", tmp_path / "ia3", "--model", minilm_dir, "-o", bundle),
            *("--placement", placement, "--optimize", "none", "--json"),
        )
        plan = msgspec.json.decode(made.stdout)["manifest"]["plan"]
        # a key's and a value's output is scaled with its bias; output.dense's input is
        assert {edit["placement"] for edit in plan["edits"]} == {"own weight" if placement == "auto" else "side op"}
        # 2 x 6 keys and values, and of every layer attention.output.dense and output.dense
        assert len(plan["edits"]) == 24
        verified = cli("verify", bundle, "--json")
        assert msgspec.json.decode(verified.stdout)["passed"], placement
