"""``deployfa convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from deployfa.cli.console import done, spinner
from deployfa.cli.options import AllowMismatch, Force, ModelOption, StrengthOption
from deployfa.errors import InputError

__all__ = ["convert"]

#: What --out must end in; a method that any form holds is written in the form that --out names.
_SUFFIXES = {
    "pt": [".pt"],
    "safetensors": [".safetensors"],
    "peft": [""],
    "lora": [""],
    "ia3": [""],
    "onnx-adapter": [".onnx_adapter"],
}
_FORMS = {suffix: f"a name that ends in {suffix}" for suffix in (".pt", ".safetensors", ".onnx_adapter")}


def convert(
    file: Annotated[Path, typer.Argument(help="A .pt, a .safetensors, or a PEFT directory.", show_default=False)],
    to: Annotated[
        Literal["pt", "safetensors", "peft", "lora", "ia3", "vefa", "onnx-adapter"],
        typer.Option(
            "--to",
            help="A form (pt, safetensors, peft), or the method that equals this one: lora for a LoRFA, ia3 for a VeFA "
            "(PEFT directories), vefa for an IA3 (the form that --out names); onnx-adapter for the slots of a bundle.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write.", show_default=False)],
    strength: StrengthOption = 1.0,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="With onnx-adapter: the bundle with slots that it is for.")
    ] = None,
    model: ModelOption = None,
    force: Force = False,
    allow_base_mismatch: AllowMismatch = False,
) -> None:
    """Write an adapter in another form, where that is exact; refuse, with the reason, where it is not.

    Examples: deployfa convert lorfa.pt --to lora --out lora

    deployfa convert other.pt --to onnx-adapter --bundle slots.bundle --out other.onnx_adapter

    deployfa convert vefa.pt --to ia3 --out ia3, and back: deployfa convert ia3 --to vefa --out vefa.pt
    """
    from deployfa.adapter import Adapter
    from deployfa.atomic import check_output
    from deployfa.convert import to_ia3, to_lora, to_vefa, with_strength

    wanted = _SUFFIXES.get(to, [".pt", ".safetensors", ""])
    if out.suffix not in wanted:
        forms = " or ".join(_FORMS.get(suffix, "a directory, a name without a suffix") for suffix in wanted)
        raise InputError(f"--to {to} writes {forms}, not '{out}'")
    if (bundle is not None) != (to == "onnx-adapter"):
        raise InputError("--to onnx-adapter and --bundle BUNDLE go together: the file is for the slots of that bundle")
    check_output(out, force=force)
    adapter = with_strength(Adapter.load(file), strength)
    if bundle is not None:
        from deployfa.bundle import Bundle
        from deployfa.slots import write_slot

        with spinner("converting") as status:
            write_slot(
                Bundle.open(bundle),
                adapter,
                out,
                model=model,
                allow_base_mismatch=allow_base_mismatch,
                force=force,
                status=status,
            )
        done(f"wrote '{out}'; next: deployfa run {bundle} --adapter {out} --text ...")
        return
    if to == "lora":
        with spinner("converting") as status:
            adapter = to_lora(adapter, model=model, status=status)
    elif to == "ia3":
        adapter = to_ia3(adapter)
    elif to == "vefa":
        adapter = to_vefa(adapter)
    adapter.save(out, force=force)
    done(f"wrote '{out}'; next: deployfa inspect {out}")
