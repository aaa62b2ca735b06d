"""``deployfa train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deployfa.cli.console import done, print_json, progress_bar, show, spinner
from deployfa.cli.options import Force, Json, named_files
from deployfa.errors import InputError

if TYPE_CHECKING:
    from deployfa.recipe import Recipe

__all__ = ["train"]


def train(
    train_file: Annotated[
        Path | None,
        typer.Option(
            "--train",
            help="CSV or JSONL with text,label; labelled pictures; to generate: text, or prompt,completion, or a .txt. "
            "Default: data of the recipe's own.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Where to write: vefa.pt, .safetensors, a directory. Default: RECIPE-METHOD.pt."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Base model: directory or hub id. Default: the recipe's own.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="What the model does. Default: the recipe's, or text-classification."),
    ] = None,
    method: Annotated[
        Literal["vefa", "lorfa", "lora", "full", "head"], typer.Option("--method", help="What to train.")
    ] = "vefa",
    eval_file: Annotated[Path | None, typer.Option("--eval", help="Rows to score, from the training domain.")] = None,
    ood: Annotated[list[str] | None, typer.Option("--ood", help="NAME=FILE: rows of another domain to score.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="Sites and defaults; see deployfa models.")] = None,
    sites: Annotated[
        str,
        typer.Option(
            "--sites",
            help="recipe: the recipe's; all: every layer; attention: queries and values; or a regex of paths.",
        ),
    ] = "recipe",
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Default: the recipe's for the method.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Passes over the rows. Default: the recipe's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows per step. Default: the recipe's.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="r of LoRFA and LoRA.")] = 8,
    alpha: Annotated[float | None, typer.Option("--alpha", help="s = alpha / r. Default: s = 1 LoRFA, 2 LoRA.")] = None,
    shift: Annotated[bool, typer.Option("--shift", help="Also train δ, one more vector per site.")] = False,
    share_input: Annotated[
        bool, typer.Option("--share-input", help="One edit for sites with the same input (q/k/v, gate/up).")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same CPU: the same adapter, bit for bit.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto: a GPU if any.")] = "auto",
    precision: Annotated[
        Literal["fp32", "bf16", "auto"],
        typer.Option("--precision", help="bf16: autocast, the adapter stays float32; auto: bf16 if native here."),
    ] = "fp32",
    max_length: Annotated[int | None, typer.Option("--max-length", help="Cut texts there, in tokens.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of a killed run.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train an adapter (or a head, or the whole model) and score it per domain.

    Example: deployfa train --recipe minilm --train movies_train.csv --eval movies_test.csv --out vefa.pt

    With model and data from the package index: deployfa train --recipe minilm
    """
    from deployfa.base_models import base_model
    from deployfa.models import load_recipe
    from deployfa.recipe import Recipe
    from deployfa.tasks import DEFAULT_TASK
    from deployfa.train import train as run_training

    if recipe:
        chosen = load_recipe(recipe)
    else:
        chosen = Recipe(name="default", task=task or DEFAULT_TASK, about="the task's defaults")
    if task is not None and task != chosen.task:
        raise InputError(f"recipe '{recipe}' is for {chosen.task}; leave --task out, or pass another --recipe")
    if model is None and chosen.asset is None:
        raise InputError("no base model; pass --model DIR_OR_ID, or a --recipe that brings one (--recipe minilm)")
    options: dict[str, Any] = {
        "method": method,
        "learning_rate": learning_rate if learning_rate is not None else chosen.learning_rate[method],
        "epochs": epochs if epochs is not None else chosen.epochs,
        "batch_size": batch_size if batch_size is not None else chosen.batch_size,
        "rank": rank,
        "alpha": alpha,
        "seed": seed,
        "device": device,
        "precision": precision,
        "max_length": max_length if max_length is not None else chosen.max_length,
        "sites": _sites(chosen, sites),
        "shift": shift,
        "share_input": share_input,
    }
    shifted = named_files(ood or [], "--ood")
    if train_file is None:
        train_file, eval_file, shifted = _own_rows(chosen, eval_file, shifted)
    if out is None:
        out = Path(f"{chosen.name}-{method}{'' if method == 'full' else '.pt'}")
    with progress_bar() as progress:
        report = run_training(
            model=model if model is not None else base_model(chosen.asset or ""),
            task=chosen.task,
            train_file=train_file,
            eval_file=eval_file,
            shifted_files=shifted,
            out=out,
            options=options,
            resume=resume,
            force=force,
            progress=progress,
        )
    if json:
        print_json(report)
        return
    from rich.table import Table

    title = f"{report.method}: {report.trainable_parameters:,} trainable parameters"
    if report.perplexities:
        table = Table(title=title)
        for column in ("domain", "tokens", "perplexity", "of the base", "change (%)"):
            table.add_column(column, justify="left" if column == "domain" else "right")
        for name, found in report.perplexities.items():
            change = base = ""
            own = "∞" if found.perplexity is None else f"{found.perplexity:.2f}"
            if found.base is not None:
                base = f"{found.base:.2f}"
                change = "" if found.perplexity is None else f"{100 * (found.perplexity / found.base - 1):+.1f}"
            table.add_row(name, f"{found.tokens:,}", own, base, change)
        show(table)
    table = Table(title=title)
    for column in ("domain", "rows", "accuracy (%)", "balanced accuracy (%)"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, scores in report.scores.items():
        figures = (f"{100 * scores.accuracy:.1f}", f"{100 * scores.balanced_accuracy:.1f}")
        table.add_row(name, f"{scores.rows:,}", *figures)
    if report.scores:
        show(table)
    following = "pass it as --model" if report.method == "full" else f"deployfa export --adapter {report.out}"
    done(f"wrote '{report.out}' after {report.seconds:.0f} s of training; next: {following}")


def _own_rows(
    recipe: Recipe, eval_file: Path | None, shifted: dict[str, Path]
) -> tuple[Path, Path | None, dict[str, Path]]:
    """The recipe's own data; what is given to score stays."""
    from deployfa.recipe_data import own_rows

    if recipe.data is None:
        raise InputError("no rows to train on; pass --train FILE, or a --recipe that brings some (--recipe minilm)")
    with spinner(f"preparing {recipe.data.name}") as status:
        own = own_rows(recipe.data, progress=status)
    if eval_file is not None or shifted:
        return own.train, eval_file, shifted
    return own.train, own.test, own.shifted


def _sites(recipe: Recipe, wanted: str) -> str | list[str]:
    """PEFT's ``target_modules``."""
    if wanted == "attention" and recipe.sites_attention is None:
        raise InputError(f"recipe '{recipe.name}' names no queries and values; pass --sites all, or a regex of paths")
    attention = recipe.sites_attention or ""
    named = {"all": recipe.sites_all or "all-linear", "attention": attention, "recipe": recipe.sites}
    found = named.get(wanted, wanted)
    return found if isinstance(found, str) else list(found)
