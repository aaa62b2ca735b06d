from __future__ import annotations

import shutil

from deployfa.bench import Contender
from deployfa.bench.sizes import contender_bytes, graph_bytes


def test_external_data_counts(make_graph, tmp_path):
    inside, outside = make_graph(width=128), make_graph(width=128, external=True)
    assert graph_bytes(inside) == inside.stat().st_size
    assert outside.stat().st_size < 2000
    assert graph_bytes(outside) == outside.stat().st_size + (outside.parent / "model.data").stat().st_size
    # a file that no tensor names does not count, a graph without its data is smaller
    alone = tmp_path / "alone.onnx"
    shutil.copy(outside, alone)
    (tmp_path / "unrelated.data").write_bytes(bytes(5000))
    assert graph_bytes(alone) == outside.stat().st_size


def test_a_pytorch_contender_is_its_base_and_its_adapter(tmp_path):
    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(bytes(30))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(100))
    (folder / "vocab.txt").write_bytes(bytes(7))
    assert contender_bytes(Contender("t", kind="torch", adapter=adapter, model=str(folder))) == 130
    assert contender_bytes(Contender("t", kind="torch", adapter=adapter, model="someone/on-the-hub")) is None


def test_what_is_not_onnx_has_no_size(tmp_path):
    path = tmp_path / "model.ort"
    path.write_bytes(b"\xff" * 50)
    assert graph_bytes(path) is None
