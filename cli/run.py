"""``deployfa run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deployfa.cli.console import print_json, show
from deployfa.cli.options import EngineOption, Json, PatchOption, TargetOption, Threads
from deployfa.cli.run_slots import swap
from deployfa.errors import InputError

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
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt to go on from; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A .txt with a prompt a line, or CSV or JSONL with a text column.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of each answer, at most.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most likely token, always.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from so many of the most likely; 0 from all.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the most likely that have this probability.")
    ] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="Draw from those with this share of the likeliest's.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: what was said becomes less likely.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the draws; the second prompt's is one more, and so on.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="A text that ends an answer; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    patch: PatchOption = None,
    target: TargetOption = None,
    engine: EngineOption = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer texts or pictures, label and score, or go on from prompts.  Needs onnxruntime, tokenizers or Pillow.

    Example: deployfa run vefa.bundle --text "A joy from start to finish."

    A picture: deployfa run digits.bundle --image photo.png

    A pack answers each text with its own adapter: deployfa run pack.bundle -t "A joy." -a movies -t "Broke." -a shop

    A bundle with slots runs the adapter it came with, or another: deployfa run slots.bundle -t "A joy." -a other.pt

    With an adapter's patch on a fleet's bundle: deployfa run fleet.bundle --patch vefa.patch --text "A joy."

    A bundle that generates streams its answer: deployfa run smol.bundle --prompt "Once upon a time" --temperature 0.7
    """
    from deployfa.bundle import Bundle
    from deployfa.generation.options import Options
    from deployfa.predict import Predictor, RunReport
    from deployfa.task_rows import rows_of
    from deployfa.tasks import task_of

    opened = Bundle.open(bundle, patch=patch)
    asked = prompt or prompts is not None
    options = Options(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
    )
    if opened.manifest.base.task == "text-generation":
        from deployfa.cli.run_generation import read_prompts, run_generation

        if text or image or data is not None:
            raise InputError(f"'{bundle}' generates; pass --prompt or --prompts instead of --text and --data")
        if engine is not None:
            raise InputError("generation runs in ONNX Runtime, which has no engines; leave --engine out")
        run_generation(
            opened,
            [*(prompt or []), *(read_prompts(prompts) if prompts is not None else [])],
            options,
            adapters=adapter or [],
            strength=strength,
            chat=chat,
            target=target,
            threads=threads,
            patch=patch,
            json=json,
        )
        return
    if asked or chat or options != Options():
        raise InputError(
            f"'{bundle}' does not generate ({opened.manifest.base.task}); leave --prompt and what goes with it out"
        )
    task = task_of(opened.manifest.base.task)
    if task.kind == "image" and text:
        raise InputError(f"'{bundle}' reads pictures; pass --image FILE, not --text")
    if task.kind != "image" and image:
        raise InputError(f"'{bundle}' reads text; pass --text, not --image")
    items: list[Any] = [*(text or []), *(image or [])]
    names = [str(item) for item in items]
    if data is not None:
        rows = rows_of(task, data, need_label=False)
        items += [row.item for row in rows]
        names += [row.text for row in rows]
    if not items:
        raise InputError('nothing to answer; pass --text "...", --image FILE or --data FILE')
    predictor = Predictor(opened, target=target, engine=engine, threads=threads)
    if predictor.slots is not None:
        swap(opened, predictor.slots, adapter or [])
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
