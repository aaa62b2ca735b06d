"""MiniLM as others would hand it to us: the same weights, with the names of another exporter or none."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from filelock import FileLock

from deployfa.adapter import Adapter
from deployfa.base_graphs import base_graph
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.evaluate import evaluate
from deployfa.graph.storage import load_graph, save_graph

#: Unequal lengths: what is padded must not be seen
FEEDS = {
    "input_ids": np.array([[101, 1037, 6569, 2000, 3422, 102], [101, 2025, 2026, 102, 0, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    "token_type_ids": np.zeros((2, 6), dtype=np.int64),
}


def error(found, truth):
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


@dataclass(frozen=True, eq=False)
class Ours:
    """What the project's own export and apply answer, in float64, and what float32 does to it."""

    path: Path
    truth: np.ndarray
    noise: float


@pytest.fixture(scope="session")
def adapters(trained):
    """Name → adapter: trained on the real MiniLM, each with a classifier of its own."""
    return {name: Adapter.load(trained[name]) for name in ("vefa", "lorfa", "lora")}


@pytest.fixture(scope="session")
def ours(adapters, minilm_dir):
    def make(name):
        if name not in made:
            base = base_graph(adapters[name], model=minilm_dir)
            adapted = apply_adapter(base.load(), adapters[name], make_plan(base.load(), adapters[name]))
            truth = answer(adapted)
            made[name] = Ours(base.folder / "model.onnx", truth, error(answer(adapted, dtype="float32"), truth))
        return made[name]

    made = {}
    return make


def answer(model, *, output="logits", dtype="float64"):
    return evaluate(model, [FEEDS], dtype=dtype)[0][output]


@pytest.fixture(scope="session")
def foreign(shared, ours, minilm_dir):
    """Name → path of a graph; made once for all workers, do not write beside them."""
    folder = shared / "foreign"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            partial = shared / "foreign.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _make_all(partial, ours("vefa").path, minilm_dir)
            partial.rename(folder)
    return {"own": ours("vefa").path, **{path.parent.name: path for path in folder.glob("*/model.onnx")}}


def _make_all(folder, base, minilm_dir):
    for name, change in {
        "stripped": _strip,
        "scrambled": _scramble,
        "no-shapes": lambda model: _drop_shapes(_strip(model)),
    }.items():
        (folder / name).mkdir(parents=True)
        save_graph(change(load_graph(base)), folder / name)
    _optimised(onnx.load(base), folder / "ort-basic")
    _legacy(minilm_dir, folder)
    _optimised(onnx.load(folder / "legacy" / "model.onnx"), folder / "legacy-ort-basic")


def _strip(model):
    for node in model.graph:
        node.metadata_props.clear()
    return model


def _scramble(model):
    """No name says anything, and the initializers are in another order."""
    _strip(model)
    rng = np.random.default_rng(0)
    values = [value for node in model.graph for value in node.outputs if not value.is_graph_output()]
    stored = list(model.graph.initializers.values())
    for name in [*model.graph.initializers]:
        del model.graph.initializers[name]
    for number, at in enumerate(rng.permutation(len(stored))):
        stored[at].name = f"w{number}"
        model.graph.register_initializer(stored[at])
    for number, value in enumerate(values):
        value.name = f"v{number}"
    for number, node in enumerate(model.graph):
        node.name = f"n{number}"
    return model


def _drop_shapes(model):
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    return model


def _optimised(model, folder):
    """What onnxruntime saves of its basic optimisations; ``model`` has its weights with it."""
    import onnxruntime

    folder.mkdir()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "model.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _legacy(minilm_dir, folder):
    """torch.onnx.export(dynamo=False), of the classifier and of the encoder alone."""
    import torch
    import transformers as tf

    class Encoder(tf.BertModel):
        def forward(self, input_ids, attention_mask, token_type_ids):
            of = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return super().forward(input_ids, **of).last_hidden_state

    feeds = {name: torch.from_numpy(array) for name, array in FEEDS.items()}
    axes = {name: {0: "batch", 1: "sequence"} for name in [*feeds, "hidden"]} | {"logits": {0: "batch"}}
    for name, kind, output in (
        ("legacy", tf.BertForSequenceClassification, "logits"),
        ("encoder", Encoder, "hidden"),
    ):
        (folder / name).mkdir()
        torch.manual_seed(0)
        model = kind.from_pretrained(minilm_dir).eval()
        given = (feeds,) if name == "legacy" else tuple(feeds.values())
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                given,
                str(folder / name / "model.onnx"),
                dynamo=False,
                opset_version=17,
                input_names=list(feeds),
                output_names=[output],
                dynamic_axes={key: value for key, value in axes.items() if key in {*feeds, output}},
            )


@pytest.fixture(scope="session")
def answer_of():
    """``answer_of(model, output=, dtype=)``: what a graph answers to two sentences."""
    return answer


@pytest.fixture
def main(monkeypatch, capsys):
    """``main("apply", …)``: the command in this process, with what it printed and its exit status."""
    from deployfa.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["deployfa", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(exit_.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def one_line():
    """Assert exit status 2 and one ``error:`` line with every part in it; steps that were reported come before it."""

    def check(result, *parts):
        lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("·")]
        assert result.returncode == 2 and result.stdout == "", result.stderr
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        for part in parts:
            assert part in lines[0], lines[0]

    return check


@pytest.fixture(scope="session")
def hashes():
    """Folder → sha256 of every file in it."""
    return lambda folder: {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
