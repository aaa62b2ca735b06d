"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deployfa.errors import InputError

if TYPE_CHECKING:
    from deployfa.bench import Shape
    from deployfa.tasks import Kind

__all__ = [
    "AdapterOption",
    "AllowMismatch",
    "EngineOption",
    "Force",
    "Json",
    "ModelOption",
    "PatchOption",
    "PlacementOption",
    "PreferOption",
    "RequireFold",
    "StrengthOption",
    "TargetOption",
    "Threads",
    "Untie",
    "named_files",
    "parse_shapes",
]

AdapterOption = Annotated[
    Path, typer.Option("--adapter", "-a", help="A .pt, a .safetensors, or a PEFT directory.", show_default=False)
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="The base model: directory or hub id. Default: the one the adapter names."),
]
PatchOption = Annotated[
    Path | None, typer.Option("--patch", help="An adapter's patch for this bundle, from export --delta.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Go on although the adapter was trained on another base.")
]
RequireFold = Annotated[bool, typer.Option("--require-fold", help="Fail, with the reason, instead of a side op.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of the runtime. Default: all cores.")]
PlacementOption = Annotated[
    Literal["auto", "fold", "side-op"],
    typer.Option("--placement", help="Where edits go; auto and fold use a side op only where a fold is not exact."),
]
PreferOption = Annotated[
    Literal["smallest-patch", "own-weight"],
    typer.Option(
        "--prefer", help="Among exact folds: the one that changes the fewest bytes, or always the layer's own weight."
    ),
]
Untie = Annotated[
    bool,
    typer.Option("--untie", help="Give a weight tied to the embedding a copy of its own; the plan says its bytes."),
]
StrengthOption = Annotated[
    float, typer.Option("--strength", help="Scale the edits: 0 is the base with the adapter's head, 1 the adapter.")
]
EngineOption = Annotated[
    str | None, typer.Option("--engine", help="Of a target that runs engines: which one, such as tensorrt-rtx-fp16.")
]
TargetOption = Annotated[
    str | None,
    typer.Option("--target", help="Where it runs; deployfa doctor lists what can. Default: the bundle's own."),
]


def parse_shapes(text: str, kind: Kind = "text") -> list[Shape]:
    """``1x128,8x128`` → shapes; of a model of pictures, which have no length, the batch alone counts."""
    from deployfa.bench import Shape

    shapes = [Shape.parse(part) for part in text.split(",") if part.strip()]
    if kind == "image":
        shapes = [Shape(batch) for batch in dict.fromkeys(shape.batch for shape in shapes)]
    return shapes


def named_files(pairs: list[str], option: str) -> dict[str, Path]:
    """``NAME=FILE`` pairs → {name: path}; raises ``InputError`` on anything else."""
    found: dict[str, Path] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise InputError(f"'{pair}' is not NAME=FILE; write {option} tweets=tweets.csv")
        if name in found:
            raise InputError(f"{option} names '{name}' twice; give each file its own name")
        found[name] = Path(file)
    return found
