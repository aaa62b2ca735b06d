"""README's ``deployfa apply`` commands, as written, on the kinds of graph that it speaks of."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path

import numpy as np
import onnx

from deployfa.graph.storage import load_graph

ROOT = Path(__file__).resolve().parents[2]


def test_the_commands_run_as_written(main, foreign, trained, ours, minilm_dir, answer_of, tmp_path, monkeypatch):
    from onnxruntime import quantization

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```text\n(.*?)```", readme, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("deployfa apply")]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vefa.pt").write_bytes(trained["vefa"].read_bytes())
    (tmp_path / "MiniLM").symlink_to(minilm_dir)
    (tmp_path / "model.onnx").write_bytes(foreign["legacy"].read_bytes())
    logging.disable(logging.WARNING)
    quantization.quantize_dynamic(onnx.load("model.onnx"), "model_int8.onnx", per_channel=True)
    logging.disable(logging.NOTSET)
    vendor = load_graph(foreign["scrambled"])
    onnx.save(onnx.load(foreign["scrambled"]), "vendor.onnx")
    (head,) = (node.name for node in vendor.graph if node.op_type == "Gemm" and 2 in node.inputs[1].shape)
    (tmp_path / "sites.json").write_text(json.dumps({"classifier": head}))
    for words in commands:
        result = main(*words[1:])
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stderr}"

    own, found = ours("vefa"), {}
    for out in ("adapted", "adapted_vendor", "adapted_int8"):
        found[out] = np.linalg.norm(answer_of(load_graph(tmp_path / out / "model.onnx")) - own.truth)
    scale = np.linalg.norm(own.truth)
    assert max(found["adapted"], found["adapted_vendor"]) <= own.noise * scale
    # int8 is as far off as int8 is, not as far as another head
    assert own.noise * scale < found["adapted_int8"] < 0.3 * scale
