"""Adapters of every kind, and a way to write a ``.pt`` by hand."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit, LowRank

DTYPES = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}


def _adapter(method: str, dtype: str = "float32") -> Adapter:
    rng = np.random.default_rng(0)

    def draw(*shape: int):
        return rng.standard_normal(shape).astype(DTYPES[dtype])

    edits = {
        "vefa": lambda: Edit(lam=draw(4), delta=draw(4)),
        "lorfa": lambda: Edit(input_low_rank=LowRank(draw(2, 4), draw(4, 2), 0.75), delta=draw(4)),
        "lora": lambda: Edit(output_low_rank=LowRank(draw(2, 4), draw(3, 2), 0.75)),
    }
    alpha = {"vefa": {}, "lorfa": {"r": 2, "alpha": 1.5}, "lora": {"r": 2, "lora_alpha": 1.5}}[method]
    return Adapter(
        method=method,
        edits={site: edits[method]() for site in ("fc1", "layer.0.fc2")},
        modules={"classifier": {"weight": draw(2, 4), "bias": draw(2)}},
        base=BaseReference(name="some/base", fingerprint="sha256:" + "ab" * 32, architecture="Bert", task="text"),
        labels=("neg", "più"),
        config={"target_modules": ["fc1", "fc2"], "modules_to_save": ["classifier"], **alpha},
        training={"seed": 1, "loss": 0.125, "nested": {"list": [1, None, True, "x"]}},
    )


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """``(method, dtype)`` → an adapter with two sites, a head and metadata of every JSON type."""
    return _adapter


@pytest.fixture
def write_pt(tmp_path: Path) -> Callable[..., Path]:
    """``(pickle bytes, storages)`` → a file as ``torch.save`` lays it out, whatever the pickle says."""

    def write(pickled: bytes, storages: Mapping[str, bytes] = {}, *, members: Mapping[str, bytes] = {}, **how) -> Path:
        path = tmp_path / "made.pt"
        with zipfile.ZipFile(path, "w", **how) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", b"little")
            for key, data in storages.items():
                archive.writestr(f"archive/data/{key}", data)
            for name, data in members.items():
                archive.writestr(name, data)
        return path

    return write
