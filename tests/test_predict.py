"""Answering with a bundle that somebody changed, and texts that are none."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deployfa.bundle import Bundle
from deployfa.errors import BundleError, InputError
from deployfa.predict import Predictor


@pytest.fixture
def changed(bundles: dict[str, Path], tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """``changed(edit)`` → a copy of the bundle whose manifest went through ``edit``."""

    def copy(edit: Callable[[dict[str, Any]], object]) -> Path:
        folder = Path(shutil.copytree(bundles["folded"], tmp_path / "copy"))
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes())
        edit(manifest)
        (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        return folder

    return copy


def test_another_number_of_labels_is_refused(changed) -> None:
    with pytest.raises(BundleError, match="1 labels for 2 outputs"):
        list(Predictor(Bundle.open(changed(lambda m: m["labels"].pop()))).answer(["x"]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["labels"].__setitem__(0, m["labels"][1]), "names a label twice"),
        (lambda m: m["preprocessing"].update(max_length=-5), "max_length -5"),
        (lambda m: m["graph"].update(file="../copy/model.onnx"), r"vouches for no '\.\./copy/model\.onnx'"),
        (lambda m: m["reference"].update(file="elsewhere"), "vouches for no 'elsewhere'"),
        (lambda m: m["files"].pop("adapter.safetensors"), r"vouches for no 'adapter\.safetensors'"),
        (lambda m: m["files"].pop("model.onnx.data"), r"vouches for no 'model\.onnx\.data'"),
        (lambda m: m["files"].pop("tokenizer.json"), r"vouches for no 'tokenizer\.json'"),
    ],
)
def test_what_is_read_must_be_vouched_for(changed, edit, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Bundle.open(changed(edit))


def test_a_broken_tokenizer_is_one_clear_error(changed) -> None:
    digest = hashlib.sha256(b"garbage").hexdigest()
    folder = changed(lambda m: m["files"].update({"tokenizer.json": digest}))
    (folder / "tokenizer.json").write_bytes(b"garbage")
    with pytest.raises(BundleError, match="is no tokenizer"):
        Predictor(Bundle.open(folder))


def test_empty_and_very_long_texts_are_answered_and_broken_ones_named(bundles: dict[str, Path]) -> None:
    predictor = Predictor(Bundle.open(bundles["folded"]))
    assert predictor.logits(["", "good film " * 2000, "x"]).shape == (3, 2)
    with pytest.raises(InputError, match="text 2 is not valid UTF-8"):
        predictor.logits(["fine", "bad \udcff"])
