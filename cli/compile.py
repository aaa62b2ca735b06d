"""``deployfa compile``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from deployfa.cli.console import done, print_json, progress_bar, show, spinner, warn
from deployfa.cli.options import Force, Json, ModelOption
from deployfa.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from deployfa.lowered import Lowered
    from deployfa.runtimes.tensorrt.record import EngineRecord

__all__ = ["CompileReport", "compile_", "engine_table"]


class CompileReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``compile --json``; ``engine`` is what the manifest keeps."""

    bundle: str
    engine: dict[str, Any]
    rebuilt_graph: bool
    warnings: list[str]


def compile_(
    bundle: Annotated[Path, typer.Argument(help="A bundle directory.", show_default=False)],
    target: Annotated[
        str, typer.Option("--target", help="tensorrt, built on its own GPU, or tensorrt-rtx, built anywhere.")
    ] = "tensorrt-rtx",
    precision: Annotated[
        str, typer.Option("--precision", help="fp32; fp16 or bf16, norms and softmax in float32; or int8 (Q/DQ).")
    ] = "fp32",
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            help="Sizes of a dimension, NAME=MIN,OPT,MAX. Default: batch=1,4,16, sequence=1,128,longest.",
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            help="A GPU generation to build for, such as 8.9; may be given several times. Default: all from 8.0 on.",
        ),
    ] = None,
    workspace: Annotated[
        str | None, typer.Option("--workspace", help="Scratch memory of a kernel: 512M, 2G. Default: no limit.")
    ] = None,
    tf32: Annotated[
        bool, typer.Option("--tf32/--no-tf32", help="Let float32 products round their factors to 10 bits.")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Let weights be replaced later by others like them; needs the GPU.")
    ] = False,
    level: Annotated[
        int | None,
        typer.Option("--level", min=0, max=5, help="0 builds quickly, 5 runs quickly."),
    ] = None,
    model: ModelOption = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Build a TensorRT engine of a bundle, into the bundle.

    The graph is typed and held against the stored reference before it is built.

    Example: deployfa compile vefa.bundle --target tensorrt-rtx --precision fp16 --profile batch=1,8,32
    """
    from deployfa.bundle import Bundle
    from deployfa.compile import compile_bundle
    from deployfa.runtimes.tensorrt.profiles import parse_profile

    sizes = parse_profile(profile or [])
    opened = Bundle.open(bundle)
    with progress_bar() as report, spinner("compiling") as status:
        compiled = compile_bundle(
            opened,
            target,
            precision=precision,
            profile=sizes,
            compute_capabilities=compute_capability or [],
            workspace_bytes=_bytes(workspace) if workspace is not None else None,
            tf32=tf32,
            refit=refit,
            level=level,
            model=model,
            force=force,
            status=status,
            progress=lambda share: report("building", 100 * share, 100),
        )
    warn(compiled.warnings)
    engine = compiled.engine
    if json:
        print_json(
            CompileReport(
                bundle=str(bundle),
                engine=msgspec.to_builtins(engine),
                rebuilt_graph=compiled.rebuilt,
                warnings=list(compiled.warnings),
            )
        )
        return
    show(engine_table(engine))
    if compiled.lowered.kept:
        show(kept_table(compiled.lowered))
    done(f"wrote '{bundle}/{engine.file}' ({engine.bytes / 1e6:.1f} MB in {engine.seconds:.1f} s)")


def engine_table(engine: EngineRecord) -> Table:
    """One engine, a line for each thing worth knowing."""
    from rich.table import Table

    table = Table(title=f"Engine {engine.name}")
    table.add_column("what")
    table.add_column("value")
    table.add_row("library", f"{engine.target} {engine.library_version}")
    table.add_row("compute capabilities", ", ".join(engine.compute_capabilities) or "that of the GPU it was built on")
    table.add_row("sizes (min, opt, max)", "; ".join(f"{name} {sizes}" for name, sizes in engine.profile.items()))
    table.add_row("layers by type", ", ".join(f"{kind} {count}" for kind, count in engine.layer_types.items()))
    if engine.graph_error is not None:
        error = f"{engine.graph_error:.1e} of the reference, in ONNX Runtime; limit {engine.error_limit:.1e}"
        table.add_row("error of its graph", error)
    table.add_row("sha256", engine.sha256)
    return table


def kept_table(lowered: Lowered) -> Table:
    """Which operators compute in the low precision, and which stayed in float32."""
    from rich.table import Table

    table = Table(title=f"Operators in {lowered.precision}")
    table.add_column("operator")
    table.add_column(lowered.precision, justify="right")
    table.add_column("float32", justify="right")
    table.add_column("why float32")
    for op in sorted({*lowered.low, *lowered.kept}):
        table.add_row(op, str(lowered.low.get(op, 0)), str(lowered.kept.get(op, 0)), lowered.reasons.get(op, ""))
    return table


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
#: Builders count bytes in 64 bits, with a sign in places.
_MOST = 2**50
_DIGITS = 20


def _bytes(text: str) -> int:
    """``512M`` → 536870912."""
    number, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not number.isdecimal() or unit not in _UNITS or not number.strip("0"):
        raise InputError(f"'{text}' is no size; write --workspace 512M or 2G")
    if len(number) > _DIGITS or int(number) * _UNITS[unit] > _MOST:
        raise InputError(f"--workspace is more than any GPU has; write 512M or 2G, or leave it out: {text[:_DIGITS]}…")
    return int(number) * _UNITS[unit]
