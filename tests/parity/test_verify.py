"""Verify: equal bundles pass, and every way of breaking one is seen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from deployfa.bundle import Bundle
from deployfa.bundle.bundle import sha256_file, write_manifest
from deployfa.data import read_rows
from deployfa.errors import InputError
from deployfa.graph.storage import load_graph
from deployfa.parity import verify

Corrupt = Callable[[ir.Model], None]


def _corrupted(source: Path, target: Path, corrupt: Corrupt) -> Bundle:
    """A copy of the bundle with a changed graph and a manifest that vouches for it: only parity can tell."""
    shutil.copytree(source, target)
    model = load_graph(target / "model.onnx")
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    corrupt(model)
    (target / "model.onnx.data").unlink()
    ir.save(model, target / "model.onnx", external_data="model.onnx.data")
    manifest = Bundle.open(target, check_files=False).manifest
    files = {name: sha256_file(target / name) for name in manifest.files}
    write_manifest(target, msgspec.structs.replace(manifest, files=files))
    return Bundle.open(target)


def _weight(model: ir.Model, shape: tuple[int, ...]) -> ir.Value:
    """The largest-named initializer of that shape that a MatMul, Gemm or attention reads."""
    found = [v for v in model.graph.initializers.values() if v.shape is not None and tuple(v.shape) == shape]
    return found[len(found) // 2]


def _set(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)


def swap_two_rows(model: ir.Model) -> None:
    value = _weight(model, (1536, 384))
    array = np.array(value.const_value.numpy())
    array[[3, 4]] = array[[4, 3]]
    _set(value, array)


def transpose_a_square_weight(model: ir.Model) -> None:
    value = _weight(model, (384, 384))
    _set(value, np.array(value.const_value.numpy()).T)


def drop_a_bias(model: ir.Model) -> None:
    value = _weight(model, (1536,))
    _set(value, np.zeros(1536, np.float32))


def one_nan(model: ir.Model) -> None:
    value = _weight(model, (1536, 384))
    array = np.array(value.const_value.numpy())
    array[7, 7] = np.nan
    _set(value, array)


def swap_the_labels(model: ir.Model) -> None:
    value = _weight(model, (2, 384))
    _set(value, np.array(value.const_value.numpy())[::-1])


@pytest.mark.parametrize("name", ["folded", "side-op"])
def test_a_good_bundle_passes_against_pytorch(
    name: str, bundles: dict[str, Path], small_data: dict[str, Path], minilm_dir: Path
) -> None:
    rows = read_rows(small_data["movies_test"])
    report = verify(Bundle.open(bundles[name]), rows=rows, model=minilm_dir, use_torch=True)
    assert report.passed, report.reason
    assert [stage.name for stage in report.stages] == [
        "PyTorch float32",
        "ONNX Runtime, optimisations off",
        "ONNX Runtime, as deployed",
    ]
    assert all(stage.flips_outside_noise == 0 and stage.finite for stage in report.stages)
    # float32 has 24 bits; a noise far from its rounding would make the limit meaningless
    assert 2.0**-26 < report.noise < 2.0**-16
    assert report.effect > 0.01
    assert report.truth_accuracy is not None
    assert report.stages[-1].accuracy == pytest.approx(report.truth_accuracy)
    assert report.stages[-1].mcnemar_p == 1.0
    assert report.rows == len(rows) + 7  # one alone, shortest, longest, and four padded


@pytest.mark.parametrize("name", ["folded", "side-op"])
def test_a_good_bundle_passes_against_its_stored_reference(name: str, bundles: dict[str, Path]) -> None:
    report = verify(Bundle.open(bundles[name]), use_torch=False)
    assert report.passed, report.reason
    assert len(report.stages) == 2


@pytest.mark.parametrize(
    "corrupt",
    [swap_two_rows, transpose_a_square_weight, drop_a_bias, one_nan, swap_the_labels],
    ids=lambda f: f.__name__,
)
def test_a_corrupted_graph_is_seen_without_torch(corrupt: Corrupt, bundles: dict[str, Path], tmp_path: Path) -> None:
    report = verify(_corrupted(bundles["folded"], tmp_path / "bad", corrupt), use_torch=False)
    assert not report.passed
    assert not report.stages[-1].passed


def test_a_corrupted_graph_is_seen_with_torch(bundles: dict[str, Path], minilm_dir: Path, tmp_path: Path) -> None:
    bad = _corrupted(bundles["folded"], tmp_path / "bad", swap_two_rows)
    report = verify(bad, model=minilm_dir, use_torch=True)
    assert not report.passed
    assert report.stages[0].passed, "PyTorch itself is still right"


def test_nan_says_so(bundles: dict[str, Path], tmp_path: Path) -> None:
    report = verify(_corrupted(bundles["folded"], tmp_path / "bad", one_nan), use_torch=False)
    assert "NaN" in report.reason
    assert report.stages[-1].error is None
    assert msgspec.json.decode(msgspec.json.encode(report), type=type(report)) == report


def test_rows_without_torch_are_refused(bundles: dict[str, Path], small_data: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="--data"):
        verify(Bundle.open(bundles["folded"]), rows=read_rows(small_data["movies_test"]), use_torch=False)
