"""Fixtures that several test files share: real models and data, the wheel, an environment without torch."""

from __future__ import annotations

import os

# before torch, tokenizers or onnxruntime read them: two pytest workers share the cores, and nothing may go online
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]
#: Minutes each; at the end they would run alone while the other worker has nothing left.
LONGEST = ("test_docs.py", "test_demo.py")
SOURCES = ("deployfa", "cli", "models")
Cli = Callable[..., subprocess.CompletedProcess[str]]

# the same examples every time, however busy the machine; PROPERTY_EXAMPLES=20000 searches others (graph/strategies.py)
settings.register_profile(
    "suite",
    deadline=None,
    derandomize="PROPERTY_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a directory that ``AutoModel.from_pretrained`` and ``AutoTokenizer`` take."""
    from deployfa.assets import fetch

    return fetch("minilm")


@pytest.fixture(scope="session")
def vader_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``movies_train``, ``movies_test``, ``tweets``, ``amazon``, ``nyt`` → CSV file."""
    from deployfa.vader import prepare_vader

    return prepare_vader(tmp_path_factory.mktemp("vader") / "data")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree: building in place leaves files that two workers would fight over."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean_venv(wheel: Path) -> Path:
    """The python of an environment that holds the wheel with the ``cpu`` extra and nothing else: no torch.

    The environment is kept under build/, keyed on everything that decides what pip puts there; only the wheel itself is
    installed anew when the sources changed.
    """
    key = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        key.update((ROOT / name).read_bytes())
    home = ROOT / "build" / f"clean-venv-{key.hexdigest()[:12]}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = home / "sources.sha256"
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in (ROOT / name).rglob("*") if path.suffix != ".pyc"):
        if path.is_file():
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())

    def pip(*arguments: str) -> None:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
        result = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    home.parent.mkdir(exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        if not stamp.is_file():
            for old in home.parent.glob("clean-venv-*"):
                if old.is_dir():
                    shutil.rmtree(old)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            pip("--constraint", str(ROOT / "constraints.txt"), f"deployfa[cpu] @ {wheel.as_uri()}")
        elif stamp.read_text(encoding="utf-8") != digest.hexdigest():
            pip("--no-deps", "--force-reinstall", str(wheel))
        stamp.write_text(digest.hexdigest(), encoding="utf-8")
    return python


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all pytest workers of this run share: what is slow to make is made once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def small_data(shared: Path, vader_files: dict[str, Path]) -> dict[str, Path]:
    """The first rows of each VADER file: 96 to train on, 48 to score."""
    folder = shared / "small"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            partial = shared / "small.partial"
            partial.mkdir()
            for name, path in vader_files.items():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                rows = 96 if name == "movies_train" else 48
                (partial / path.name).write_text("".join(lines[: rows + 1]), encoding="utf-8")
            partial.rename(folder)
    return {name: folder / path.name for name, path in vader_files.items()}


@pytest.fixture(scope="session")
def trained(shared: Path, small_data: dict[str, Path], minilm_dir: Path) -> dict[str, Path]:
    """``vefa``, ``lorfa``, ``lora``, ``head`` → an adapter file trained on the real MiniLM for a few steps."""
    from deployfa.models import load_recipe
    from deployfa.train import train

    recipe = load_recipe("minilm")
    with FileLock(shared / "trained.lock"):
        for method in ("vefa", "lorfa", "lora", "head"):
            out = shared / f"{method}.pt"
            if not out.is_file():
                options = {
                    "method": method,
                    "learning_rate": 0.02,
                    "epochs": 1,
                    "batch_size": 16,
                    "sites": recipe.sites,
                }
                train(
                    model=minilm_dir,
                    task="text-classification",
                    train_file=small_data["movies_train"],
                    eval_file=small_data["movies_test"],
                    shifted_files={"tweets": small_data["tweets"]},
                    out=out,
                    options=options,
                )
    return {method: shared / f"{method}.pt" for method in ("vefa", "lorfa", "lora", "head")}


@pytest.fixture(scope="session")
def bundles(shared: Path, trained: dict[str, Path]) -> dict[str, Path]:
    """``folded`` and ``side-op`` → a bundle of the VeFA adapter; do not write into them, copy first."""
    from deployfa.adapter import Adapter
    from deployfa.pipeline import export

    adapter = Adapter.load(trained["vefa"])
    with FileLock(shared / "bundles.lock"):
        for name, placement in (("folded", "fold"), ("side-op", "side-op")):
            if not (shared / name).is_dir():
                export(adapter, shared / name, optimize="ort", placement=placement)
    return {name: shared / name for name in ("folded", "side-op")}


@pytest.fixture(scope="session")
def slot_bundles(shared: Path, trained: dict[str, Path]) -> dict[str, Path]:
    """With slots: ``vefa``, room for four labels, fused; ``lora``, unfused; ``plain``, VeFA without an idle branch.

    Do not write into them, copy first.
    """
    from deployfa.adapter import Adapter
    from deployfa.data import Row
    from deployfa.preprocess.sentences import SENTENCES
    from deployfa.slots import export_slots

    options = {
        "vefa": {"optimize": "ort", "max_labels": 4},
        "lora": {"optimize": "none"},
        "plain": {"optimize": "onnxscript", "idle_branch": False, "max_labels": 3},
    }
    found = {name: shared / f"slots-{name}" for name in options}
    # enough that the ratio of two noises settles; all of the built-in ones take 10 s longer a bundle
    rows = [Row(text=text) for text in SENTENCES[:40]]
    with FileLock(shared / "slots.lock"):
        for name, given in options.items():
            if not found[name].is_dir():
                adapter = Adapter.load(trained["vefa" if name == "plain" else name])
                export_slots(adapter, found[name], rows=rows, **given)
    return found


@pytest.fixture(scope="session")
def compiled(shared: Path, bundles: dict[str, Path]) -> Path:
    """The folded bundle with an engine of TensorRT for RTX in it; do not write into it, copy first."""
    from deployfa.bundle import Bundle
    from deployfa.compile import compile_bundle

    path = shared / "compiled"
    with FileLock(shared / "compiled.lock"):
        if not path.is_dir():
            partial = Path(shutil.copytree(bundles["folded"], shared / "compiled.partial", dirs_exist_ok=True))
            compile_bundle(Bundle.open(partial), "tensorrt-rtx", compute_capabilities=["8.9"], force=True)
            partial.rename(path)
    return path


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("inspect", path)`` → the finished process; ``cwd`` and ``env`` as for subprocess."""

    def run(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deployfa.cli", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **(env or {})}
        )

    return run
