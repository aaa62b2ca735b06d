"""How many sentences a second each method trains on, by deployfa's own training code (``deployfa.training.fit``)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu_measure import ROUNDS, first_line

from deployfa.bench.statistics import median_ratio, minimum_samples
from deployfa.data import Row
from deployfa.edits import Array
from deployfa.errors import StatisticsError

__all__ = ["METHODS", "PRECISIONS", "Fitted", "compare", "fit_once", "training_plan"]

#: Method → learning rate, that of the demo; the first is what the others are held against.
METHODS = {"full": 5e-5, "vefa": 5e-3, "lora": 1e-3}
PRECISIONS = ("fp32", "bf16")
#: Steps between two looks at the clock, for which the GPU must have caught up.
_STEPS = 5
#: Steps at the start that are not counted: kernels are chosen, memory is taken.
_WARM = 10


class Fitted(dict[str, Any]):
    """Of one run: ``block_s`` (blocks,) seconds of ``_STEPS`` steps each, ``trainable``, ``loss``, ``peak_bytes``."""


def training_plan(torch_why_not: str | None, *, bf16: bool) -> list[tuple[str, str, str | None]]:
    """(method, precision, why it will not be run)."""
    return [
        (
            method,
            precision,
            torch_why_not or ("this GPU does not compute in bfloat16" if precision == "bf16" and not bf16 else None),
        )
        for precision in PRECISIONS
        for method in METHODS
    ]


def fit_once(
    method: str,
    precision: str,
    rows: Sequence[Row],
    *,
    device: str,
    batch_size: int,
    warm: int = _WARM,
    steps: int = _STEPS,
) -> Fitted:
    """Train MiniLM on ``rows`` for one epoch, whole batches only.  The clock is read every ``steps`` steps, when the
    GPU has caught up.

    precision: ``bf16`` is autocast to bfloat16 by the Hugging Face Trainer, weights and optimiser in float32.
    """
    import torch

    from deployfa.assets import fetch
    from deployfa.data import label_names
    from deployfa.models import load_recipe
    from deployfa.training.fit import fit
    from deployfa.training.options import FitOptions
    from deployfa.training.tokenizer import save_tokenizer

    rows = rows[: len(rows) // batch_size * batch_size]
    # where there is none, fit says so
    on_gpu = device == "cuda" and torch.cuda.is_available()
    moments: list[float] = []

    def progress(what: str, done: int, total: int) -> None:
        if what != "training" or done < warm or (done - warm) % steps:
            return
        if on_gpu:
            torch.cuda.synchronize()
        moments.append(time.perf_counter())

    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    base, recipe = fetch("minilm"), load_recipe("minilm")
    options: Any = {"device": device, "precision": precision, "sites": recipe.sites, "batch_size": batch_size}
    with tempfile.TemporaryDirectory(prefix="deployfa-gpu-fit-") as folder:
        save_tokenizer(base, Path(folder))
        trained = fit(
            base,
            recipe.task,
            rows,
            {},
            label_names(rows),
            FitOptions(method=method, learning_rate=METHODS[method], epochs=1, **options),  # type: ignore[arg-type]
            folder=Path(folder),
            work=Path(folder) / "work",
            progress=progress,
        )
    if len(moments) < 2:
        raise StatisticsError(f"{len(rows)} rows are too few to time steps of {batch_size}; train on more")
    return Fitted(
        block_s=np.diff(moments),
        samples_a_block=steps * batch_size,
        trainable=trained.trainable_parameters,
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )


def compare(
    plan: Sequence[tuple[str, str, str | None]],
    run: Callable[[str, str], Fitted],
    *,
    launches: int,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``launches`` times all of ``plan`` in an order drawn anew; rows of results, and of what was not run.

    One seed gives every method the same batches in the same order, so block i of one is paired with block i of another.
    """
    random = np.random.default_rng(seed)
    runs: dict[tuple[str, str], list[Fitted]] = {(m, p): [] for m, p, why in plan if why is None}
    failed = {(m, p): why for m, p, why in plan if why is not None}
    for _ in range(launches):
        for number in random.permutation(len(runs)):
            key = list(runs)[number]
            if key in failed:
                continue
            try:
                runs[key].append(run(*key))
            except Exception as error:  # out of memory, or whatever a library raises
                failed[key] = first_line(error)
    done = {key: fitted for key, fitted in runs.items() if key not in failed}
    results = [_row(key, fitted, done.get((next(iter(METHODS)), key[1]))) for key, fitted in done.items()]
    return results, [{"method": m, "precision": p, "reason": why} for (m, p), why in failed.items()]


Runs = Sequence[Mapping[str, Any]]


def _row(key: tuple[str, str], runs: Runs, full: Runs | None) -> dict[str, Any]:
    rates = _rates(runs)
    row = {
        "method": key[0],
        "precision": key[1],
        "launches": len(runs),
        "blocks": int(sum(each.size for each in rates)),
        "samples_per_s": float(np.median(np.concatenate(rates))),
        "trainable": runs[0]["trainable"],
        "peak_bytes": max((each["peak_bytes"] for each in runs if each["peak_bytes"] is not None), default=None),
        **dict.fromkeys(("over_full", "over_full_low", "over_full_high")),
    }
    if full is None or full is runs or row["blocks"] < minimum_samples(0.5) or min(map(len, rates)) < ROUNDS:
        return row
    interval = median_ratio(rates, _rates(full), seed=0)
    return {**row, "over_full": interval.estimate, "over_full_low": interval.low, "over_full_high": interval.high}


def _rates(runs: Runs) -> list[Array]:
    """Samples a second of every block, (blocks, 1) a run."""
    return [each["samples_a_block"] / each["block_s"][:, None] for each in runs]
