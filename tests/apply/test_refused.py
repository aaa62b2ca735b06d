"""``deployfa apply`` on the command line: what it prints, and one line with the way out for everything it refuses."""

from __future__ import annotations

import json
import shutil

import jsonschema
import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from deployfa.adapter import Adapter
from deployfa.apply import ApplyReport, apply_to_graph
from deployfa.edits import Edit
from deployfa.errors import BaseMismatchError, SiteError
from deployfa.graph.storage import load_graph

QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"


def changed(source, folder, change):
    """The graph at ``source`` after ``change``, saved in ``folder``."""
    model = load_graph(source)
    change(model.graph.initializers)
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def test_it_prints_how_each_site_was_found(cli, foreign, trained, tmp_path):
    """In a process of its own, as a user has it."""
    result = cli("apply", foreign["legacy"], "-a", trained["vefa"], "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"bias name '{QUERY}'" in result.stdout and "initializer name 'classifier'" in result.stdout
    assert "onnx::MatMul_" in result.stdout and "/bert/encoder/layer.0/attention/self/query/MatMul" in result.stdout
    assert "36 folded, 0 side ops" in result.stdout
    assert "model.onnx, plan.json, sites.json (pass it to --sites" in result.stderr


def test_json(main, foreign, trained, tmp_path):
    result = main("apply", foreign["stripped"], "-a", trained["lora"], "-o", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    document, schema = json.loads(result.stdout), msgspec.json.schema(ApplyReport)
    jsonschema.validate(document, schema)
    report = msgspec.json.decode(result.stdout, type=ApplyReport)
    assert len(report.sites) == 37 and len(report.plan.edits) == 36
    assert {site.site: site.weight for site in report.sites} == json.loads((tmp_path / "out/sites.json").read_text())
    del document["sites"][3]["how"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_another_model_is_refused(main, one_line, foreign, trained, adapters, minilm_dir, tmp_path):
    """The names fit and the weights do not; without --model nobody can know."""

    def reseed(stored):
        rng = np.random.default_rng(1)
        for name, value in stored.items():
            if "layer.3" in name and name.endswith("weight.T"):
                numbers = value.const_value.numpy()
                value.const_value = ir.tensor(numbers.std() * rng.standard_normal(numbers.shape).astype(np.float32))

    graph = changed(foreign["stripped"], tmp_path / "other", reseed)
    command = ["apply", graph, "-a", trained["vefa"], "-o", tmp_path / "out"]
    found = "initializer name 'bert.encoder.layer.3.attention.self.query'"
    one_line(main(*command, "--model", minilm_dir), f"was found by {found}", "not the base model's; pass the graph of")
    with pytest.raises(BaseMismatchError):
        apply_to_graph(graph, adapters["vefa"], tmp_path / "out", model=minilm_dir)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    assert main(*command).returncode == 0

    # one number of one weight is enough
    def nudge(stored):
        value = stored["bert.encoder.layer.5.output.dense.weight.T"]
        numbers = value.const_value.numpy().copy()
        numbers[7, 9] = np.nextafter(numbers[7, 9], 1)
        value.const_value = ir.tensor(numbers)

    graph = changed(foreign["stripped"], tmp_path / "nudged", nudge)
    with pytest.raises(BaseMismatchError, match=r"'bert.encoder.layer.5.output.dense'"):
        apply_to_graph(graph, adapters["vefa"], tmp_path / "again", model=minilm_dir)


def test_two_layers_with_one_weight(main, one_line, foreign, adapters, minilm_dir, tmp_path):
    """Names say nothing and the weights are those of two layers: named in --sites, each is found."""
    model = shutil.copytree(minilm_dir, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["encoder.layer.0.attention.self.key.weight"] = weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, model / "model.safetensors")
    wanted = weights["encoder.layer.0.attention.self.query.weight"].T
    old = load_file(minilm_dir / "model.safetensors")["encoder.layer.0.attention.self.key.weight"].T

    def alike(stored):
        for name, value in stored.items():
            if tuple(value.shape) == (384, 384) and np.array_equal(value.const_value.numpy(), old):
                value.const_value = ir.tensor(np.ascontiguousarray(wanted))
                twins.append(name)
            elif tuple(value.shape) == (384, 384) and np.array_equal(value.const_value.numpy(), wanted):
                twins.append(name)

    twins = []
    graph = changed(foreign["scrambled"], tmp_path / "twins", alike)
    adapter = Adapter("vefa", {site: adapters["vefa"].edits[site] for site in (QUERY, KEY)})
    adapter.save(tmp_path / "two.safetensors")
    command = ["apply", graph, "-a", tmp_path / "two.safetensors", "-o", tmp_path / "out", "--model", model]
    one_line(main(*command), "site 'bert.", "' has the weight of several layers: ", *twins, "; name one in --sites")
    assert not (tmp_path / "out").exists()
    (tmp_path / "map.json").write_text(json.dumps({QUERY: twins[0], KEY: twins[1]}))
    result = main(*command, "--sites", tmp_path / "map.json")
    assert result.returncode == 0, result.stderr


def test_what_is_not_found_lists_what_is_near(main, one_line, foreign, trained, adapters, minilm_dir, tmp_path):
    command = ["apply", "-a", trained["lora"], "-o", tmp_path / "out"]
    # LoRA knows both sizes: only layers of that size are candidates
    result = main(*command, foreign["scrambled"])
    one_line(result, f"site '{QUERY}' not found; nearest layers of its size: 'w", "(MatMul, 384→384)")
    one_line(result, "name one in --sites, or pass the base model with --model to compare weights")
    assert "1536" not in result.stderr
    # the base has no classifier: comparing was tried and is not offered again
    result = main(*command, foreign["scrambled"], "--model", minilm_dir)
    one_line(
        result, "site 'classifier' not found; nearest layers of its size: 'w", "(Gemm, 384→2); name one in --sites"
    )
    assert "compare weights" not in result.stderr
    # a part of the model that the graph lacks
    one_line(main(*command, foreign["encoder"]), "site 'classifier' not found; no layer of the graph has its size (")
    other = Adapter("vefa", {"bert.encoder.layer.0.crossattention.self.query": adapters["vefa"].edits[QUERY]})
    with pytest.raises(SiteError, match=r"nearest layers of its size: 'bert\.encoder\.layer\.0\.attention\.self\.\w+"):
        apply_to_graph(foreign["stripped"], other, tmp_path / "out")
    narrow = Adapter("vefa", {QUERY: Edit(lam=np.ones(7, np.float32))})
    with pytest.raises(SiteError, match=r"no layer of the graph has its size .*; sizes there: 384→2, 384→384"):
        apply_to_graph(foreign["scrambled"], narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"{", ("is not a JSON object of names",)),
        (b"[1, 2]", ("is not a JSON object of names",)),
        (b'{"a": 3}', ("is not a JSON object of names",)),
        (b"\xff\xfe", ("is not a JSON object of names",)),
        (
            json.dumps({"bert.nowhere": "w"}).encode(),
            ("--sites names 'bert.nowhere', which the adapter does not change",),
        ),
        (json.dumps({QUERY: "nothing"}).encode(), (f"site '{QUERY}': no layer has a weight or node called 'nothing'",)),
        (
            json.dumps({QUERY: f"{KEY}.weight.T"}).encode(),
            (f"sites '{QUERY}' and '{KEY}' are both found at '{KEY}.weight.T'; name both in --sites",),
        ),
        (
            json.dumps({"classifier": "bert.pooler.dense.weight"}).encode(),
            ("module 'classifier': weight has shape (2, 384), the graph's has (384, 384)",),
        ),
    ],
)
def test_bad_site_maps(content, parts, main, one_line, foreign, trained, tmp_path):
    (tmp_path / "map.json").write_bytes(content)
    command = ["apply", foreign["stripped"], "-a", trained["vefa"], "-o", tmp_path / "out"]
    one_line(main(*command, "--sites", tmp_path / "map.json"), *parts)
    assert not (tmp_path / "out").exists()


def test_paths(main, one_line, foreign, trained, minilm_dir, tmp_path):
    adapter, out = ["-a", trained["vefa"]], tmp_path / "out"
    one_line(
        main("apply", foreign["stripped"], *adapter, "-o", tmp_path / "x.onnx"), f"pass a folder: {tmp_path / 'x'}"
    )
    one_line(main("apply", tmp_path / "no.onnx", *adapter, "-o", out), "no graph at", "pass an .onnx file")
    (tmp_path / "text.onnx").write_text("not a graph")
    one_line(main("apply", tmp_path / "text.onnx", *adapter, "-o", out), "is not an ONNX graph")
    command = ["apply", foreign["stripped"], *adapter, "-o", out]
    one_line(main(*command, "--sites", tmp_path / "none.json"), "no file", "--sites takes a JSON file such as")
    one_line(main(*command, "--model", tmp_path / "none"), "no model at", "pass its directory with --model")
    (tmp_path / "empty").mkdir()
    one_line(main(*command, "--model", tmp_path / "empty"), "holds no *.safetensors and no *.bin")
    one_line(main(*command, "--model", trained["vefa"]), "no model at")
    one_line(main("apply", foreign["stripped"], "-a", foreign["stripped"], "-o", out), "error: ")
    assert not out.exists()


def test_force(main, one_line, foreign, trained, hashes, tmp_path):
    command = ["apply", foreign["stripped"], "-a", trained["vefa"], "-o", tmp_path / "out"]
    assert main(*command).returncode == 0
    first = hashes(tmp_path / "out")
    one_line(main(*command), "exists; pass --force to replace it")
    one_line(main(*command, "--placement", "side-op"), "exists; pass --force to replace it")
    assert hashes(tmp_path / "out") == first
    assert main(*command, "--force", "--placement", "side-op").returncode == 0
    assert hashes(tmp_path / "out") != first
    assert main(*command, "--force", "--sites", tmp_path / "out" / "sites.json").returncode == 0
    assert hashes(tmp_path / "out") == first
    # a refusal leaves what was there
    (tmp_path / "map.json").write_text(json.dumps({QUERY: "nothing"}))
    one_line(main(*command, "--force", "--sites", tmp_path / "map.json"), "no layer has a weight or node called")
    assert hashes(tmp_path / "out") == first
    # somebody's folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    one_line(main(*command[:-1], tmp_path / "mine", "--force"), "so --force leaves it alone")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_the_graph_that_is_read_is_not_replaced(main, one_line, foreign, trained, hashes, tmp_path):
    folder = shutil.copytree(foreign["stripped"].parent, tmp_path / "base")
    before = hashes(folder)
    for out in (folder, tmp_path):
        command = ["apply", folder / "model.onnx", "-a", trained["vefa"], "-o", out, "--force"]
        one_line(main(*command), "pass another --out")
    command = ["apply", foreign["stripped"], "-a", trained["vefa"], "-o", folder, "--force", "--model", folder]
    one_line(main(*command), f"'{folder}' holds '{folder}', which --force would replace; pass another --out")
    assert hashes(folder) == before


def test_placement_options_reach_the_plan(main, one_line, foreign, trained, tmp_path):
    command = ["apply", foreign["stripped"], "-a", trained["vefa"], "--json"]
    plan = json.loads(main(*command, "-o", tmp_path / "a", "--prefer", "own-weight").stdout)["plan"]
    assert {edit["placement"] for edit in plan["edits"]} == {"own weight"}
    plan = json.loads(main(*command, "-o", tmp_path / "b", "--placement", "side-op").stdout)["plan"]
    assert {edit["placement"] for edit in plan["edits"]} == {"side op"}
    half = json.loads(main(*command, "-o", tmp_path / "c", "--strength", "0.5").stdout)["plan"]
    assert (
        half["edits"] and (tmp_path / "c/model.onnx.data").read_bytes() != (tmp_path / "a/model.onnx.data").read_bytes()
    )
