"""Every recipe of text adapts just the layers that it says, in models of its kind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from torch import nn
from typer.testing import CliRunner

from deployfa.cli.app import app
from deployfa.models import load_recipe, recipe_names
from deployfa.recipe import Recipe
from deployfa.tasks import TASKS

_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 60,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
#: Model, recipe, layers a block, of which queries and values.
CASES = {
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SMALL)), "bert", 6, 2),
    "minilm": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SMALL)), "minilm", 6, 2),
    "roberta": (lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**_SMALL)), "roberta", 6, 2),
    "xlm-roberta": (lambda: tf.XLMRobertaForSequenceClassification(tf.XLMRobertaConfig(**_SMALL)), "roberta", 6, 2),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)), "gpt2", 4, None),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SMALL, **_ENDS)), "llama", 7, 2),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**_SMALL, **_ENDS)), "llama", 7, 2),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SMALL, **_ENDS)), "llama", 7, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_layers_of_every_block_and_no_others(case: str) -> None:
    make, name, each, attention = CASES[case]
    recipe = load_recipe(name)
    layers = {
        path
        for path, module in make().named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    found = {path for path in layers if re.fullmatch(str(recipe.sites), path)}
    assert len(found) == 2 * each
    # what is left is a head, a pooler, or the embedding's own weight
    assert all(re.search(r"classifier|pooler|lm_head", path) for path in layers - found)
    if attention is None:
        assert recipe.sites_attention is None
    else:
        queries = {path for path in layers if re.fullmatch(str(recipe.sites_attention), path)}
        assert len(queries) == 2 * attention
        assert all(re.search(r"(query|value|q_proj|v_proj)$", path) for path in queries)


def test_every_recipe_is_of_a_task_and_listed() -> None:
    listed = CliRunner().invoke(app, ["models"]).stdout
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.task in TASKS
        assert name in listed


def test_a_recipe_without_queries_says_so(tmp_path: Any) -> None:
    (tmp_path / "rows.csv").write_text("text\nA joy.\n")
    command = [sys.executable, "-m", "deployfa.cli", "train", "--recipe", "gpt2", "--model", str(tmp_path)]
    command += ["--sites", "attention", "--train", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "a.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "names no queries and values; pass --sites all" in done.stderr


def test_the_recipe_in_contributing_is_one() -> None:
    """As it is written, on a small OPT."""
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(RECIPE = .*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"Recipe": Recipe}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    recipe = names["RECIPE"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4, "vocab_size": 60}
    model = tf.OPTForCausalLM(tf.OPTConfig(**sizes, word_embed_proj_dim=32, **_ENDS))  # type: ignore[arg-type]
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {path for path in layers if re.fullmatch(recipe.sites, path)}
    assert len(found) == 12
    assert layers - found == {"lm_head"}
    assert len({path for path in layers if re.fullmatch(recipe.sites_attention, path)}) == 4
