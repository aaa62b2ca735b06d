"""Patch files: what is written comes back, and everything else is refused in one line before a session is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from deployfa.adapter import Adapter
from deployfa.adapter.safetensors_io import read_safetensors, write_safetensors
from deployfa.bundle import Bundle
from deployfa.bundle.patch import PatchMeta, graph_files, read_patch, write_patch
from deployfa.edits import Array
from deployfa.errors import BundleError, DeployfaError, InputError, OutputExistsError

NORM = "bert.encoder.layer.0.output.LayerNorm.weight"
HEAD = "classifier.bias"
TENSORS = {NORM: np.linspace(0, 1, 384, dtype=np.float32), HEAD: np.array([0.5, -0.5], np.float32)}
Write = Callable[..., Path]


@pytest.fixture
def write(bundles: dict[str, Path], tmp_path: Path) -> Write:
    """``write(tensors, **changes)`` → a patch for the folded bundle whose metadata has ``changes``."""

    def make(tensors: dict[str, Array] = TENSORS, **changes: object) -> Path:
        manifest = Bundle.open(bundles["folded"], check_files=False).manifest
        meta = PatchMeta(
            bundle=graph_files(manifest),
            fusion="ort",
            base=manifest.base,
            adapter=manifest.adapter,
            plan=manifest.plan,
            labels=["bad", "good"],
            versions={},
            noise=3e-7,
            noise_max_abs=1e-6,
            error=4e-7,
            truth=np.arange(6, dtype="<f8").tobytes(),
            base_answers=np.arange(6, dtype="<f4").tobytes(),
        )
        path = tmp_path / "a.patch"
        write_patch(path, tensors, msgspec.structs.replace(meta, **changes), force=True)
        return path

    return make


def test_what_is_written_comes_back(write: Write, bundles: dict[str, Path]) -> None:
    path = write()
    bundle = Bundle.open(bundles["folded"], patch=path)
    assert bundle.patch is not None
    assert bundle.patch.tensor_bytes == 4 * 386
    assert bundle.initializers.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(bundle.initializers[name], array)
    assert bundle.labels == ["bad", "good"]
    first, second = bundle.patch.answers([1, 2])
    assert first[0].tolist() == [[0, 1]] and second[1].tolist() == [[2, 3], [4, 5]]


def test_without_a_patch_a_bundle_is_as_it_was(bundles: dict[str, Path]) -> None:
    bundle = Bundle.open(bundles["folded"])
    assert (bundle.patch, bundle.initializers, bundle.labels) == (None, {}, ["negative", "positive"])


def test_the_same_patch_is_the_same_bytes_and_is_not_overwritten(write: Write) -> None:
    path = write()
    content = path.read_bytes()
    meta = read_patch(path).meta
    assert write(dict(reversed(TENSORS.items()))).read_bytes() == content
    with pytest.raises(OutputExistsError, match="--force"):
        write_patch(path, TENSORS, meta)


def test_the_answers_follow_the_patch(write: Write, bundles: dict[str, Path]) -> None:
    """Head and labels both: b = (50, -50) makes every text ``bad``."""
    from deployfa.predict import Predictor

    path = write({HEAD: np.array([50, -50], np.float32)})
    answers = list(Predictor(Bundle.open(bundles["folded"], patch=path)).answer(["a joy", "a bore"]))
    assert [answer.label for answer in answers] == ["bad", "bad"]
    assert min(answer.score for answer in answers) > 0.999


def test_a_result_with_a_patch_is_not_recorded_in_the_bundle(write: Write, bundles: dict[str, Path]) -> None:
    before = (bundles["folded"] / "manifest.json").read_bytes()
    Bundle.open(bundles["folded"], patch=write()).record(parity={"passed": True})
    assert (bundles["folded"] / "manifest.json").read_bytes() == before


def refused(path: Path, bundle: Path, error: type[DeployfaError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Bundle.open(bundle, patch=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"elsewhere": TENSORS[NORM]}, "holds 'elsewhere', which the graph of .* has not"),
        ({NORM: TENSORS[NORM][:383]}, rf"'{NORM}' is float32 \[383\], in the graph of .* it is float32 \[384\]"),
        ({NORM: TENSORS[NORM].astype(np.float64)}, r"is float64 \[384\], in the graph of .* it is float32 \[384\]"),
        ({HEAD: np.array([[1, 2]], np.float32)}, r"is float32 \[1, 2\], in the graph of .* it is float32 \[2\]"),
    ],
)
def test_a_tensor_without_its_place_is_refused(write: Write, bundles: dict[str, Path], tensors, message: str) -> None:
    refused(write(tensors), bundles["folded"], BundleError, message)


def test_a_patch_for_another_bundle_is_refused(write: Write, bundles: dict[str, Path]) -> None:
    refused(write(), bundles["side-op"], BundleError, "patch for another bundle .*sha256")
    other_weights = graph_files(Bundle.open(bundles["folded"]).manifest) | {"model.onnx.data": "0" * 64}
    refused(write(bundle=other_weights), bundles["folded"], BundleError, "patch for another bundle")
    refused(write(bundle={}), bundles["folded"], BundleError, "patch for another bundle")


def test_one_changed_byte_anywhere_is_noticed(write: Write, bundles: dict[str, Path]) -> None:
    path = write()
    content = path.read_bytes()
    for position in [*range(0, len(content), 41), len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            Bundle.open(bundles["folded"], check_files=False, patch=path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 7, 500, -1])
def test_a_cut_file_is_refused(write: Write, bundles: dict[str, Path], keep: int) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, bundles["folded"], BundleError, "not a whole patch file; copy it again")


def test_other_files_are_no_patches(bundles: dict[str, Path], tmp_path: Path) -> None:
    refused(tmp_path / "absent.patch", bundles["folded"], InputError, "no patch at .*export --delta")
    refused(bundles["folded"], bundles["folded"], InputError, "no patch at")
    refused(bundles["folded"] / "adapter.safetensors", bundles["folded"], BundleError, "is not a patch")
    with pytest.raises(DeployfaError, match="not a deployfa adapter"):
        write_safetensors(tmp_path / "a.safetensors", TENSORS, {"format": "deployfa-patch/1"})
        Adapter.load(tmp_path / "a.safetensors")


def test_metadata_of_another_version_is_refused(write: Write, bundles: dict[str, Path]) -> None:
    """Whole and signed, but not what this version reads."""
    from deployfa.bundle.patch import _digest

    path = write()
    tensors, header = read_safetensors(path)
    meta = msgspec.json.encode({"bundle": {}})
    write_safetensors(path, tensors, {**header, "meta": meta.decode(), "sha256": _digest(meta, tensors)})
    refused(path, bundles["folded"], BundleError, "broken metadata .*another version")


def test_labels_twice_and_a_reference_of_another_size_are_refused(write: Write, bundles: dict[str, Path]) -> None:
    refused(write(labels=["x", "x"]), bundles["folded"], BundleError, "names a label twice")
    patch = read_patch(write())
    for rows in ([], [4], [1, 3]):
        with pytest.raises(BundleError, match="was not measured on the reference of this bundle"):
            list(patch.answers(rows))
