"""From files of rows to an adapter file: what ``deployfa train`` does."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from deployfa.atomic import check_output, storage_errors, write_directory
from deployfa.bundle.bundle import sha256_file
from deployfa.data import Row, label_ids, label_names
from deployfa.errors import DataError, InputError, MissingExtraError, StorageError
from deployfa.metrics import Perplexity, Scores
from deployfa.task_rows import rows_of
from deployfa.tasks import ZERO_SHOT, Task, task_of

__all__ = ["TrainReport", "train"]

Progress = Callable[[str, int, int], None]


class TrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was trained and how good it is; the schema of ``train --json``.

    Per domain: scores, fractions in [0, 1]; of a language model perplexities instead.
    """

    out: str
    method: str
    model: str
    labels: list[str]
    train_rows: int
    trainable_parameters: int
    seconds: float
    scores: dict[str, Scores] = {}
    perplexities: dict[str, Perplexity] = {}
    options: dict[str, Any]


def train(
    *,
    model: str | Path,
    task: str,
    train_file: Path,
    eval_file: Path | None,
    shifted_files: Mapping[str, Path],
    out: Path,
    options: Mapping[str, Any],
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> TrainReport:
    """Train on ``train_file``, score ``eval_file`` and every shifted domain, write ``out``.

    ``options`` are those of ``deployfa.training.options.FitOptions``.  Checkpoints lie in ``OUT.work`` while it runs,
    and stay there if it is killed, for ``resume``.  ``out`` is an adapter file, or for full fine-tuning a directory.
    """
    kept = ("config.json" if options.get("method") == "full" else "adapter_config.json") if out.suffix == "" else None
    check_output(out, force=force, holding=kept)
    if not out.name:
        raise InputError(f"'{out}' is no name for an adapter; pass --out vefa.pt")
    # files first: importing PyTorch takes seconds that a typo should not cost
    labelled = task_of(task).labelled
    rows = rows_of(task_of(task), train_file)
    labels = label_names(rows) if labelled else []
    if labelled and len(labels) < 2:
        raise DataError(f"'{train_file}' has one label only ('{labels[0]}'); a classifier needs two or more")
    domains = _domains(task_of(task), eval_file, shifted_files, labels)
    try:
        from deployfa.training.base import label_order, quiet
        from deployfa.training.fit import fit
        from deployfa.training.options import FitOptions
        from deployfa.training.picture_steps import save_files
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "train", "training") from error

    if labelled:
        labels = label_order(model, labels)
    chosen = FitOptions(**options)
    if chosen.method == "full" and task == ZERO_SHOT:
        raise InputError("the text tower writes the head anew from the labels, so there is no whole model; use vefa")
    if chosen.method == "full" and out.suffix:
        raise InputError(f"full fine-tuning writes a model directory; give --out without '{out.suffix}'")
    if chosen.method != "full" and out.suffix not in {".pt", ".safetensors", ""}:
        raise InputError(f"cannot write an adapter as '{out.suffix}'; use .pt, .safetensors, or a directory")
    work = out.with_name(f"{out.name}.work")
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    with storage_errors(work):
        try:
            work.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(
                f"'{work.parent}' is not a folder, so '{out}' cannot be made; pass another --out"
            ) from error
        _same_request(work, chosen, str(model), train_file)
    scratch = tempfile.TemporaryDirectory(prefix="deployfa-train-")
    with scratch as folder, storage_errors(work), _kept_to_resume(work):
        save_files(task_of(task), model, Path(folder))
        trained = fit(
            model,
            task,
            rows,
            domains,
            labels,
            chosen,
            folder=Path(folder),
            work=work,
            resume=resume,
            progress=progress,
        )
        if trained.adapter is not None:
            trained.adapter.save(out, force=force)
        else:
            with write_directory(out, force=force) as partial:
                saved: Any = trained.model
                with quiet():
                    saved.save_pretrained(partial)
                save_files(task_of(task), model, partial)
    shutil.rmtree(work, ignore_errors=True)
    return TrainReport(
        out=str(out),
        method=chosen.method,
        model=str(model),
        labels=labels,
        train_rows=len(rows),
        trainable_parameters=trained.trainable_parameters,
        seconds=trained.seconds,
        scores={name: found for name, found in trained.scores.items() if isinstance(found, Scores)},
        perplexities={name: found for name, found in trained.scores.items() if isinstance(found, Perplexity)},
        options=msgspec.to_builtins(chosen),
    )


@contextmanager
def _kept_to_resume(work: Path) -> Iterator[None]:
    """After an error ``work`` stays only if there is something to resume from in it."""
    try:
        yield
    except BaseException:
        if not any(work.glob("checkpoint-*")):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _same_request(work: Path, options: msgspec.Struct, model: str, train_file: Path) -> None:
    """Note in ``work`` what is trained; raises ``InputError`` if what lies there is the start of something else."""
    wanted = {**msgspec.to_builtins(options), "model": model, "rows": _digest(train_file)}
    file = work / "request.json"
    if file.is_file():
        try:
            found = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        except (msgspec.DecodeError, msgspec.ValidationError):
            found = {}
        other = sorted(name for name in wanted if found.get(name) != wanted[name])
        if other:
            raise InputError(
                f"the checkpoint in '{work}' was made with another {other[0].replace('_', '-')}; repeat the options of "
                "the killed run, or leave --resume out to start anew"
            )
    file.write_bytes(msgspec.json.encode(wanted))


def _domains(
    task: Task, eval_file: Path | None, shifted_files: Mapping[str, Path], labels: Sequence[str]
) -> dict[str, Sequence[Row]]:
    """Every file read and checked before training starts: a bad label should not cost two minutes."""
    named = {**({"eval": eval_file} if eval_file is not None else {}), **shifted_files}
    domains: dict[str, Sequence[Row]] = {}
    for name, file in named.items():
        domains[name] = rows_of(task, file)
        if labels:
            label_ids(domains[name], labels)
    return domains


def _digest(rows: Path) -> str:
    """sha256 of a file of rows; of a folder of pictures that of their names and sizes, which is fast."""
    if not rows.is_dir():
        return sha256_file(rows)
    listed = sorted((str(file.relative_to(rows)), file.stat().st_size) for file in rows.rglob("*") if file.is_file())
    return hashlib.sha256(repr(listed).encode()).hexdigest()
