"""``deployfa merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deployfa.cli.console import done, warn
from deployfa.cli.options import AllowMismatch, Force
from deployfa.errors import InputError

__all__ = ["merge"]


def merge(
    files: Annotated[
        list[Path], typer.Argument(help="Adapters: .pt, .safetensors, or PEFT directories.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write: .pt, .safetensors, or a directory.", show_default=False)
    ],
    weights: Annotated[
        str | None, typer.Option("--weights", help="One number for each adapter: 0.5,0.5. Default: 1/N each.")
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Whose head and labels to keep: a file given, or its number from 1.")
    ] = None,
    force: Force = False,
    allow_base_mismatch: AllowMismatch = False,
) -> None:
    """Combine adapters of one base into one: the weighted sum of what each of them adds, exactly.

    Example: deployfa merge movies.pt tweets.pt --weights 0.7,0.3 --head movies.pt --out both.pt
    """
    from deployfa.adapter import Adapter
    from deployfa.atomic import check_output
    from deployfa.merge import merge_adapters

    check_output(out, force=force, holding="adapter_config.json" if out.suffix == "" else None)
    names = [str(file) for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"'{twice}' is given twice; give it once, with the sum of its weights")
    numbers = _numbers(weights) if weights is not None else None
    adapters = {name: Adapter.load(file) for name, file in zip(names, files, strict=True)}
    merged = merge_adapters(adapters, weights=numbers, head=head, allow_base_mismatch=allow_base_mismatch)
    warn(merged.warnings)
    merged.adapter.save(out, force=force)
    done(f"wrote '{out}'; next: deployfa export --adapter {out}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--weights '{text}' is no list of numbers; write --weights 0.5,0.5") from error
