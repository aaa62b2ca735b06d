"""``deployfa pack``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from deployfa.cli.console import done, print_json, show, spinner, warn
from deployfa.cli.export import tried_table
from deployfa.cli.options import AllowMismatch, Force, Json, ModelOption, Threads, parse_shapes
from deployfa.errors import InputError

__all__ = ["PackReport", "named", "pack"]


class PackReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``pack --json``.  ``row_bytes``: what one adapter takes; ``checked``: adapters in the reference."""

    bundle: str
    manifest: dict[str, Any]
    row_bytes: int
    checked: list[str]
    ran_torch: bool
    warnings: list[str]


def pack(
    adapters: Annotated[
        list[str],
        typer.Argument(
            help="Adapters: .pt, .safetensors or PEFT directories, or NAME=PATH; a directory of such files is all of "
            "them. The name is the file's without its ending, unless given.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The bundle.", show_default=False)],
    model: ModelOption = None,
    target: Annotated[str, typer.Option("--target", help="Runtime and provider.")] = "onnxruntime-cpu",
    optimize: Annotated[
        str,
        typer.Option("--optimize", help="auto times all and keeps the fastest; or none, ort, ort-sum, onnxscript."),
    ] = "auto",
    table_inputs: Annotated[
        bool,
        typer.Option(
            "--table-inputs",
            help="Keep the tables in a file beside the graph: adapters come and go without a new session.",
        ),
    ] = False,
    max_rank: Annotated[int, typer.Option("--max-rank", min=0, help="Room for low ranks added later.")] = 0,
    max_labels: Annotated[int, typer.Option("--max-labels", min=0, help="Room for labels of heads added later.")] = 0,
    shapes: Annotated[
        str, typer.Option("--shapes", help="BATCHxSEQUENCE,... that --optimize auto times.")
    ] = "1x128,8x128",
    check: Annotated[
        int, typer.Option("--check", min=1, help="How many adapters, spread over all, the stored reference holds.")
    ] = 16,
    data: Annotated[Path | None, typer.Option("--data", help="Texts for the stored reference outputs.")] = None,
    threads: Threads = None,
    force: Force = False,
    allow_base_mismatch: AllowMismatch = False,
    json: Json = False,
) -> None:
    """Put many adapters into one bundle: every row of a batch runs its own.

    Example: deployfa pack vefa.pt lorfa.pt shop=lora/ --out pack.bundle
    """
    from deployfa.pack import pack as run_pack
    from deployfa.task_rows import rows_of
    from deployfa.tasks import task_of

    files = _Files(named(adapters))
    task = task_of(files[next(iter(files))].base.task)
    rows = rows_of(task, data, need_label=False) if data is not None else None
    with spinner("packing") as status:
        packed = run_pack(
            files,
            out,
            model=model,
            target=target,
            optimize=optimize,
            table_inputs=table_inputs,
            max_rank=max_rank,
            max_labels=max_labels,
            shapes=parse_shapes(shapes, task.kind),
            rows=rows,
            check=check,
            threads=threads,
            force=force,
            allow_base_mismatch=allow_base_mismatch,
            status=status,
        )
    warn(packed.warnings)
    manifest = packed.bundle.manifest
    row_bytes = packed.layout.row_bytes
    if json:
        print_json(
            PackReport(
                bundle=str(out),
                manifest=msgspec.to_builtins(manifest),
                row_bytes=row_bytes,
                checked=list(packed.checked),
                ran_torch=packed.ran_torch,
                warnings=list(packed.warnings),
            )
        )
        return
    where = "in a file beside the graph" if table_inputs else "in the graph"
    show(f"{len(files)} adapters at {manifest.adapter.sites} sites, {row_bytes / 1e3:.1f} KB each, {where}")
    show(tried_table(manifest.optimization))
    done(f"wrote '{out}' ({manifest.graph.bytes / 1e6:.1f} MB); next: deployfa verify {out}")


def named(given: list[str]) -> dict[str, Path]:
    """NAME=PATH, or a path whose stem is the name; a directory that is no adapter stands for the adapters in it."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        path = Path(rest if equals else text)
        if not path.exists():
            raise InputError(f"no adapter at '{path}'; pass a .pt, a .safetensors or a PEFT directory, or NAME=PATH")
        own = name if equals else path.name if path.is_dir() else path.stem
        for each_name, each in (None if equals else _inside(path)) or [(own, path)]:
            if each_name in found:
                raise InputError(
                    f"two adapters are called '{each_name}' ('{found[each_name]}' and '{each}'); name one: "
                    f"{each_name}2={each}"
                )
            found[each_name] = each
    return found


def _inside(path: Path) -> list[tuple[str, Path]]:
    """The adapters in a directory that is none itself."""
    if not path.is_dir() or (path / "adapter_config.json").is_file():
        return []
    files = sorted(each for each in path.iterdir() if each.suffix in {".pt", ".safetensors"})
    folders = sorted(each for each in path.iterdir() if (each / "adapter_config.json").is_file())
    if not files and not folders:
        raise InputError(f"'{path}' holds no adapters; pass a .pt, a .safetensors or a PEFT directory")
    return [*((each.stem, each) for each in files), *((each.name, each) for each in folders)]


class _Files(Mapping[str, Any]):
    """Adapters that are read when asked for: ten thousand need not be in memory."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> Any:
        from deployfa.adapter import Adapter

        return Adapter.load(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)
