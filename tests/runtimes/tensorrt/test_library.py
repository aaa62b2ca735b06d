"""Which of NVIDIA's libraries are here, and what is said of one that is not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from deployfa.errors import MissingExtraError, RuntimeTargetError
from deployfa.runtimes.tensorrt import builder, library
from deployfa.runtimes.tensorrt.library import LIBRARIES, check_installed, load_library


@pytest.fixture(scope="module")
def rtx() -> library.Library:
    return load_library("tensorrt-rtx")


def test_tensorrt_rtx_builds_without_a_gpu_for_these(rtx: library.Library) -> None:
    assert rtx.rtx and rtx.builds_without_gpu
    assert tuple(int(part) for part in rtx.version.split(".")[:2]) >= library._OLDEST["tensorrt-rtx"]
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(rtx.compute_capabilities)
    sizes = [tuple(map(int, name.split("."))) for name in rtx.compute_capabilities]
    assert sizes == sorted(sizes) and min(sizes) >= (7, 5)
    for name in rtx.compute_capabilities:
        assert rtx.capability(name) == getattr(rtx.api.ComputeCapability, "SM" + name.replace(".", ""))


def test_no_default_for_gpus_without_float32(rtx: library.Library) -> None:
    default = builder.default_capabilities(rtx)
    assert set(default) == set(rtx.compute_capabilities) - {"7.5"}


@pytest.mark.parametrize("name", ["9.0", "89", "SM89", "", "8.9 "])
def test_a_capability_that_it_has_not(rtx: library.Library, name: str) -> None:
    with pytest.raises(RuntimeTargetError) as caught:
        rtx.capability(name)
    assert f"does not build for compute capability {name}; pick from: 7.5, 8.0, 8.6, 8.9, 12.0" in str(caught.value)


def test_one_that_is_not_installed() -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed here")
    message = r"the target tensorrt needs tensorrt, which is not installed; run: pip install 'deployfa\[tensorrt\]'"
    for refuse in (check_installed, load_library):
        with pytest.raises(MissingExtraError, match=message):
            refuse("tensorrt")


def _fake(folder, monkeypatch: pytest.MonkeyPatch, name: str, content: str) -> None:
    (folder / f"{name}.py").write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(library._MODULES, "tensorrt", (name,))


def test_one_that_is_too_old(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake(tmp_path, monkeypatch, "tensorrt_of_old", "__version__ = '10.3.0'\n")
    with pytest.raises(RuntimeTargetError, match=r"tensorrt is 10\.3\.0; deployfa needs 10\.12: pip install -U 'dep"):
        load_library("tensorrt")


def test_one_that_does_not_load(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "raise OSError('libnvinfer.so.11: cannot open shared object file\\nand more')\n"
    _fake(tmp_path, monkeypatch, "tensorrt_in_pieces", content)
    wanted = r"does not load \(libnvinfer.so.11: cannot open shared object file\); install deployfa\[tensorrt\] again"
    with pytest.raises(RuntimeTargetError, match=wanted):
        load_library("tensorrt")


def test_asking_whether_it_is_installed_imports_nothing() -> None:
    """A library takes a second to import and half a gigabyte."""
    code = (
        "import sys; from deployfa.runtimes.tensorrt.library import check_installed; check_installed('tensorrt-rtx');"
        "print([name for name in sys.modules if name.startswith(('tensorrt', 'onnxruntime_ep', 'torch'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert LIBRARIES == ("tensorrt", "tensorrt-rtx")
