"""A real server that is sent encoded pictures, in every form, and what is none."""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.models import load_recipe
from deployfa.pipeline import export
from deployfa.predict import Predictor
from deployfa.train import train

from ..training.tiny_pictures import save_pictures, save_tiny
from .conftest import Served, serving


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    train(
        model=save_tiny("resnet", folder / "model"),
        task="image-classification",
        train_file=save_pictures(folder / "stripes.npz"),
        eval_file=None,
        shifted_files={},
        out=folder / "vefa.pt",
        options={"method": "vefa", "learning_rate": 0.05, "epochs": 1, "sites": load_recipe("resnet").sites},
    )
    return export(Adapter.load(folder / "vefa.pt"), folder / "stripes.bundle", optimize="none").bundle.path


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[Served]:
    with serving(f"stripes={bundle}") as running:
        yield running


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    random = np.random.default_rng(0)
    found = []
    for form, size in (("PNG", (40, 24)), ("JPEG", (33, 50)), ("WEBP", (20, 20)), ("GIF", (60, 31)), ("BMP", (9, 9))):
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(stream, form)
        found.append(stream.getvalue())
    return found


def ask(served: Served, inputs: list[dict[str, Any]]) -> tuple[int, Any]:
    return served.ask("/v2/models/stripes/infer", {"inputs": inputs})[:2]


def in_json(files: list[bytes]) -> dict[str, Any]:
    data = [base64.b64encode(file).decode() for file in files]
    return {"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": data}


def as_bytes(served: Served, files: list[bytes]) -> tuple[int, Any]:
    content = b"".join(struct.pack("<I", len(file)) + file for file in files)
    tensor = {
        "name": "image", "datatype": "BYTES", "shape": [len(files)], "parameters": {"binary_data_size": len(content)},
    }  # fmt: skip
    header = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(header))}
    return served.ask("/v2/models/stripes/infer", header + content, headers=headers)[:2]


def outputs(answer: Any) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in answer["outputs"]}


def test_answers_are_the_bundles_own(served: Served, bundle: Path, files: list[bytes]) -> None:
    wanted = list(Predictor(Bundle.open(bundle)).answer(files))
    for status, answer in (ask(served, [in_json(files)]), as_bytes(served, files)):
        assert status == 200, answer
        found = outputs(answer)
        assert found["label"] == [each.label for each in wanted]
        np.testing.assert_allclose(found["score"], [each.score for each in wanted], atol=1e-5)


def test_raw_pixels_still_do(served: Served) -> None:
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [2, 3, 32, 32], "data": pixels.reshape(-1).tolist()}
    status, answer = ask(served, [tensor])
    assert status == 200, answer
    assert len(outputs(answer)["label"]) == 2
    status, answer = ask(served, [tensor, in_json([b"x"])])
    assert status == 400
    assert "takes the place of all other inputs" in answer["error"]


def test_it_says_what_it_takes(served: Served) -> None:
    status, answer, _ = served.ask("/v2/models/stripes")
    assert status == 200
    assert {"name": "image", "datatype": "BYTES", "shape": [-1]} in answer["inputs"]
    assert [each["name"] for each in answer["inputs"]] == ["pixel_values", "image"]
    _, answer, _ = served.ask("/v2/models/stripes/config")
    assert all(each["optional"] for each in answer["input"])


def test_what_is_no_picture_is_a_400(served: Served, files: list[bytes]) -> None:
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0)
    for broken, part in (
        (b"nothing", "no picture"),
        (b"", "no picture"),
        (files[0][:50], "broken or cut short"),
        (files[1][: len(files[1]) // 2], "broken or cut short"),
        (header, "more than 24,000,000"),
    ):
        for status, answer in (ask(served, [in_json([files[0], broken])]), as_bytes(served, [files[0], broken])):
            assert status == 400, (broken, answer)
            assert part in answer["error"]
            assert "picture 2" in answer["error"]
    status, answer = ask(served, [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["iVBOR*"]}])
    assert status == 400
    assert "broken base64" in answer["error"]
    status, answer = ask(served, [{"name": "image", "datatype": "BYTES", "shape": [1, 2], "data": ["a", "b"]}])
    assert status == 400
    assert "send BYTES of shape [rows]" in answer["error"]
    status, answer = as_bytes(served, [b"\xff" * (16 * 2**20 + 1)])
    assert status == 413
    # and it still answers
    assert ask(served, [in_json(files[:1])])[0] == 200
