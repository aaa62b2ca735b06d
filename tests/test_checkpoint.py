"""The weights of a model directory, in the forms in which directories keep them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from deployfa.checkpoint import weights_of
from deployfa.errors import InputError

FIRST, SECOND = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.5.output.dense"


@pytest.fixture(scope="module")
def stored(minilm_dir: Path) -> dict[str, np.ndarray]:
    """The real MiniLM's tensors, called after the encoder alone: without ``bert.``."""
    return load_file(minilm_dir / "model.safetensors")


@pytest.fixture(params=["whole", "shards", "bin", "bin shards", "bfloat16"])
def folder(request: pytest.FixtureRequest, stored: dict[str, np.ndarray], tmp_path: Path) -> Path:
    some = {name: array for name, array in stored.items() if ".layer.0." in name or ".layer.5." in name}
    parts = [{n: a for n, a in some.items() if f".layer.{at}." in n} for at in (0, 5)]
    if request.param == "whole":
        save_file(some, tmp_path / "model.safetensors")
    elif request.param == "shards":
        for number, part in enumerate(parts, start=1):
            save_file(part, tmp_path / f"model-0000{number}-of-00002.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    elif request.param == "bfloat16":
        save_file({n: a.astype(ml_dtypes.bfloat16) for n, a in some.items()}, tmp_path / "model.safetensors")
    else:
        for number, part in enumerate([some] if request.param == "bin" else parts):
            tensors = {name: torch.from_numpy(array) for name, array in part.items()}
            torch.save(tensors, tmp_path / f"pytorch_model-{number}.bin")
    return tmp_path


def test_every_form(folder: Path, stored: dict[str, np.ndarray], request: pytest.FixtureRequest) -> None:
    found = weights_of(folder, [FIRST, SECOND, "bert.encoder.layer.3.output.dense", "classifier"])
    assert set(found) == {FIRST, SECOND}
    for site, read in found.items():
        expected = stored[f"{site.removeprefix('bert.')}.weight"]
        weight = read()
        if weight.dtype == ml_dtypes.bfloat16:
            expected = expected.astype(ml_dtypes.bfloat16)
        assert weight.shape == expected.shape and np.array_equal(weight, expected)


def test_prefixes(tmp_path: Path) -> None:
    """The name itself first, whichever file it is in; a wrapper's otherwise; two that fit are none."""

    def save(name: str, number: float) -> None:
        save_file({name: np.full((2, 2), number, np.float32)}, tmp_path / f"{number}.safetensors")

    save("fc.weight", 1.0)
    save("model.a.fc.weight", 2.0)
    save("other.a.fc.weight", 3.0)
    save("a.fc.weight", 4.0)
    save("layer.1.dense.weight", 5.0)
    found = weights_of(tmp_path, ["a.fc", "x.fc", "model.a.fc", "fc2", "layer.2.dense", "y.layer.1.dense"])
    assert {site: read()[0, 0] for site, read in found.items()} == {
        "a.fc": 4.0,
        "x.fc": 1.0,
        "model.a.fc": 2.0,
        "y.layer.1.dense": 5.0,
    }
    (tmp_path / "4.0.safetensors").unlink()
    assert set(weights_of(tmp_path, ["a.fc"])) == set()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no model at"):
        weights_of(tmp_path / "none", [])
    with pytest.raises(InputError, match=r"holds no \*\.safetensors and no \*\.bin; pass a model directory"):
        weights_of(tmp_path, [])
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        weights_of(tmp_path, ["a"])
    (tmp_path / "model.safetensors").unlink()
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds no state dict"):
        weights_of(tmp_path, ["a"])
