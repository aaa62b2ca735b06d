"""``deployfa run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployfa.cli.console import print_json, show
from deployfa.cli.options import EngineOption, Json, PatchOption, TargetOption, Threads
from deployfa.errors import InputError

if TYPE_CHECKING:
    from deployfa.bundle import Bundle
    from deployfa.runtimes.slots import SlotRunner

__all__ = ["run"]


def run(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.", show_default=False)],
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text; may be given several times.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="A picture; may be given several times.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="CSV or JSONL with a text column; or pictures.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Of a pack: the adapter that answers; once for all texts, or one each. With slots: an .onnx_adapter, "
            "any adapter file, or none for the base.",
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="Of a pack's or a slot's adapter: 0 is the base, 1 all of it.")
    ] = None,
    patch: PatchOption = None,
    target: TargetOption = None,
    engine: EngineOption = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer texts or pictures: label and score.  Needs onnxruntime, and tokenizers or Pillow.

    Example: deployfa run vefa.bundle --text "A joy from start to finish."

    A picture: deployfa run digits.bundle --image photo.png

    A pack answers each text with its own adapter: deployfa run pack.bundle -t "A joy." -a movies -t "Broke." -a shop

    A bundle with slots runs the adapter it came with, or another: deployfa run slots.bundle -t "A joy." -a other.pt

    With an adapter's patch on a fleet's bundle: deployfa run fleet.bundle --patch vefa.patch --text "A joy."
    """
    from deployfa.bundle import Bundle
    from deployfa.predict import Predictor, RunReport
    from deployfa.task_rows import rows_of

    if not text and not image and data is None:
        raise InputError('nothing to answer; pass --text "...", --image FILE or --data FILE')
    opened = Bundle.open(bundle, patch=patch)
    kind = opened.manifest.preprocessing.kind
    if kind == "image" and text:
        raise InputError(f"'{bundle}' reads pictures; pass --image FILE, not --text")
    if kind != "image" and image:
        raise InputError(f"'{bundle}' reads text; pass --text, not --image")
    items: list[Any] = [*(text or []), *(image or [])]
    names = [str(item) for item in items]
    if data is not None:
        rows = rows_of(kind, data, need_label=False)
        items += [row.item for row in rows]
        names += [row.text for row in rows]
    predictor = Predictor(opened, target=target, engine=engine, threads=threads)
    if predictor.slots is not None:
        _swap(opened, predictor.slots, adapter or [])
        named = None
    else:
        named = adapter if adapter is None or len(adapter) != 1 else adapter * len(items)
    answers = list(predictor.answer(items, adapters=named or None, strength=strength))
    if json:
        print_json(RunReport(bundle=str(bundle), patch=str(patch) if patch is not None else None, answers=answers))
        return
    longest = max(len(answer.adapter or "") for answer in answers)
    width = max(len(answer.label) for answer in answers)
    for answer, name in zip(answers, names, strict=True):
        whose = f"{answer.adapter:<{longest}}  " if answer.adapter is not None else ""
        show(f"{whose}{answer.label:<{width}}  {answer.score:.3f}  {name}")


def _swap(bundle: Bundle, slots: SlotRunner, adapters: list[str]) -> None:
    """The one adapter that is named into the slots, ``none`` out of them; without a name its own stays."""
    from deployfa.slots import slot_adapter

    if len(adapters) > 1:
        raise InputError("slots hold one adapter at a time; name one, or make a pack, which mixes: deployfa pack")
    for name in adapters:
        slots.swap(None if name == "none" else slot_adapter(bundle, slots, Path(name)))
