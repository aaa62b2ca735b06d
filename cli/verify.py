"""``deployfa verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployfa.cli.console import print_json, recorded, show, spinner
from deployfa.cli.options import AllowMismatch, EngineOption, Json, ModelOption, PatchOption, TargetOption
from deployfa.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployfa.bundle import Bundle
    from deployfa.parity.other import Other

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.", show_default=False)],
    patch: PatchOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            "-a",
            help="With PyTorch. Of a bundle with slots: verify this adapter in them, an .onnx_adapter or any adapter "
            "file. Of a pack: NAME=FILE, one of its adapters and what it was packed from. With --patch: what the patch "
            "was made from.",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="CSV or JSONL rows to compare on.")] = None,
    model: ModelOption = None,
    torch: Annotated[
        bool | None,
        typer.Option(
            "--torch/--no-torch", help="Compare with PyTorch, or with the stored reference. Default: if here."
        ),
    ] = None,
    target: TargetOption = None,
    engine: EngineOption = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Rows of --data to use, from the top; of a .txt, lines.")
    ] = 500,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens", min=1, help="Of a bundle that generates, with PyTorch: compare so many. Default: 32."
        ),
    ] = None,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Prove a bundle equal to the PyTorch model with the unfolded adapter.  Exit 0 equal, 1 not.

    Example: deployfa verify vefa.bundle --data test.csv

    Another adapter in the slots of a bundle: deployfa verify slots.bundle --adapter other.onnx_adapter

    One adapter of a pack against PyTorch: deployfa verify pack.bundle --adapter movies=movies.pt
    """
    from deployfa.adapter import Adapter
    from deployfa.bundle import Bundle
    from deployfa.generation.equality import PROMPTS, verify_greedy, with_greedy
    from deployfa.parity import verify as run_verify
    from deployfa.parity.truth import TORCH_TRUTH
    from deployfa.runtimes.targets import is_engine
    from deployfa.task_rows import rows_of
    from deployfa.tasks import task_of

    opened = Bundle.open(bundle, patch=patch)
    several = opened.manifest.slots is not None or opened.manifest.tables is not None
    if allow_base_mismatch and (adapter is None or not several):
        raise InputError("--allow-base-mismatch is for the --adapter of a bundle with slots or of a pack; leave it out")
    rows = None
    if data is not None:
        rows = rows_of(task_of(opened.manifest.base.task), data, need_label=False, most=max_rows)
    given: dict[str, Any] = {"rows": rows, "model": model, "use_torch": torch}
    with spinner("verifying") as status:
        if adapter is not None and several:
            given["other"] = _other(opened, adapter, model=model, allow_mismatch=allow_base_mismatch, status=status)
        elif adapter is not None:
            given["adapter"] = Adapter.load(adapter)
        report = run_verify(opened, **given, target=target, engine=engine, status=status)
        generates = report.truth == TORCH_TRUTH and opened.manifest.preprocessing.kind == "prompt" and adapter is None
        # an engine answers step by step as the stages show; nothing here runs it over whole answers
        if generates and not is_engine(target or opened.manifest.target):
            most = new_tokens or 32
            status(f"generating {most} tokens from each of {len(PROMPTS)} prompts, here and in PyTorch")
            report = with_greedy(report, verify_greedy(opened, max_new_tokens=most, model=model, target=target))
        elif new_tokens is not None:
            raise InputError(
                "--new-tokens compares what a bundle generates in ONNX Runtime with PyTorch's generate; leave it out"
            )
    # what the manifest keeps is of the bundle's own
    if report.adapter is None:
        recorded(opened, parity=report.summary())
    if json:
        print_json(report)
    else:
        from deployfa.parity.table import render

        show(*render(report))
    if not report.passed:
        raise typer.Exit(1)


def _other(
    bundle: Bundle, adapter: str, *, model: str | None, allow_mismatch: bool, status: Callable[[str], None]
) -> Other:
    """What ``--adapter`` says: a file for the slots, or ``NAME=FILE`` of a pack; without a name it is the file's."""
    from deployfa.adapter import Adapter

    if bundle.manifest.slots is not None:
        from deployfa.slots import other_in_slots

        return other_in_slots(bundle, Path(adapter), model=model, allow_base_mismatch=allow_mismatch, status=status)
    from deployfa.cli.pack import named
    from deployfa.pack import other_in_pack

    found = named([adapter])
    if len(found) != 1:
        raise InputError(f"'{adapter}' holds {len(found)} adapters; name one of them: --adapter NAME=FILE")
    ((name, path),) = found.items()
    return other_in_pack(bundle, name, Adapter.load(path), allow_base_mismatch=allow_mismatch)
