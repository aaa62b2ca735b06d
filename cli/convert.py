"""``deployfa convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deployfa.cli.console import done, spinner
from deployfa.cli.options import Force, ModelOption, StrengthOption
from deployfa.errors import InputError

__all__ = ["convert"]

_SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors", "peft": "", "lora": ""}


def convert(
    file: Annotated[Path, typer.Argument(help="A .pt, a .safetensors, or a PEFT directory.", show_default=False)],
    to: Annotated[
        Literal["pt", "safetensors", "peft", "lora"],
        typer.Option("--to", help="lora: a LoRFA as the LoRA that equals it, in a PEFT directory.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write.", show_default=False)],
    strength: StrengthOption = 1.0,
    model: ModelOption = None,
    force: Force = False,
) -> None:
    """Write an adapter in another form, where that is exact; refuse, with the reason, where it is not.

    Example: deployfa convert lorfa.pt --to lora --out lora
    """
    from deployfa.adapter import Adapter
    from deployfa.atomic import check_output
    from deployfa.convert import to_lora, with_strength

    wanted = _SUFFIXES[to]
    if out.suffix != wanted:
        form = f"a name that ends in {wanted}" if wanted else "a directory, a name without a suffix"
        raise InputError(f"--to {to} writes {form}, not '{out}'")
    check_output(out, force=force)
    adapter = with_strength(Adapter.load(file), strength)
    if to == "lora":
        with spinner("converting") as status:
            adapter = to_lora(adapter, model=model, status=status)
    adapter.save(out, force=force)
    done(f"wrote '{out}'; next: deployfa inspect {out}")
