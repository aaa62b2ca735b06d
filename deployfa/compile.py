"""From a bundle to an engine inside it, proven first and built then."""

from __future__ import annotations

import dataclasses
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir

from deployfa.bundle import Bundle
from deployfa.bundle.engines import add_engine, check_engine_place
from deployfa.bundle.slots import slots_of
from deployfa.cache import cache_dir
from deployfa.edits import Array
from deployfa.errors import InputError, RuntimeTargetError
from deployfa.graph.row_values import ADAPTERS
from deployfa.graph.storage import save_graph
from deployfa.lowered import PRECISIONS, Judge, Lowered, lower, stored_judge
from deployfa.naming import SCOPES, module_path_of
from deployfa.parity.cases import Case, read_cases, widened
from deployfa.runtimes.onnx_adapter import read_onnx_adapter
from deployfa.runtimes.runner import TensorSpec
from deployfa.runtimes.tensorrt import LIBRARIES, BuildRequest, NodePlace, Sizes, build_engine
from deployfa.runtimes.tensorrt.library import check_installed
from deployfa.runtimes.tensorrt.profiles import resolve_profile
from deployfa.runtimes.tensorrt.record import EngineRecord
from deployfa.unfused import Unfused, unfused

__all__ = ["Compiled", "compile_bundle", "default_profile"]

#: The sizes of a batch, unless asked: one request, a few together, a full server.
_BATCH = Sizes(1, 4, 16)
_TUNED_SEQUENCE = 128
#: Room that tables get beyond what a pack holds, in rows.
_ROOM = 64


@dataclass(frozen=True, eq=False)
class Compiled:
    """A built engine, what the precision did to the graph, and whether the graph was made again from the base."""

    engine: EngineRecord
    lowered: Lowered
    rebuilt: bool
    warnings: tuple[str, ...]


def compile_bundle(
    bundle: Bundle,
    target: str,
    *,
    precision: str = "fp32",
    profile: Mapping[str, Sizes] | None = None,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    tf32: bool = False,
    refit: bool = False,
    level: int | None = None,
    model: str | Path | None = None,
    force: bool = False,
    status: Callable[[str], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Compiled:
    """Build an engine of ``bundle`` for ``target`` and put it into the bundle, whole or not at all.

    The graph that is built is held against the stored float64 reference first, in ONNX Runtime where that is
    installed: within ``LIMIT`` times the float32 noise, scaled by the rounding of ``precision``.  Slots and tables as
    inputs become inputs of the engine.  profile: sizes of dynamic dimensions; those not given are
    ``default_profile``'s.  The other options are those of ``BuildRequest``.

    Raises ``InputError`` for options that do not fit the bundle, ``OutputExistsError`` without ``force`` where the
    bundle has this engine, ``MissingExtraError`` without the library, and ``RuntimeTargetError``, which names the node
    and its module, where the graph is not taken.
    """
    say = status or (lambda _: None)
    if target not in LIBRARIES:
        raise InputError(f"no target '{target}' to compile for; targets: {', '.join(LIBRARIES)}")
    if precision not in PRECISIONS:
        raise InputError(f"no precision '{precision}'; precisions: {', '.join(PRECISIONS)}")
    check_installed(target)
    name = f"{target}-{precision}"
    check_engine_place(bundle, name, force=force)
    say("reading the graph")
    plain = unfused(bundle, model=model, status=status)
    inputs = _signature(plain.model.graph.inputs)
    sizes = resolve_profile(inputs, profile or {}, default_profile(bundle, inputs, plain.defaults))
    _check_sequence(bundle, sizes)
    say(f"typing the graph: {precision}")
    nodes = _named(plain.model)
    judge, why_not = _judge(bundle, plain)
    lowered = lower(plain.model, precision, judge)
    say("holding the graph against the reference")
    error, warnings = _checked(lowered, judge, why_not)
    with tempfile.TemporaryDirectory(prefix="deployfa-compile-") as folder:
        graph = save_graph(lowered.model, Path(folder))
        say(f"building for {target}")
        request = BuildRequest(
            target=target,
            graph=str(graph),
            inputs=inputs,
            nodes=nodes,
            profile=sizes,
            compute_capabilities=list(compute_capabilities),
            workspace_bytes=workspace_bytes,
            tf32=tf32,
            refit=refit,
            level=level,
            timings=str(cache_dir() / f"{target}.timings"),
        )

        def build(path: Path) -> EngineRecord:
            built = build_engine(request, path, progress)
            return EngineRecord(
                name=name,
                target=target,
                precision=precision,
                library_version=built.library_version,
                compute_capabilities=built.compute_capabilities,
                profile=sizes,
                inputs=inputs,
                outputs=_signature(lowered.model.graph.outputs),
                optional=sorted(plain.defaults),
                tf32=tf32,
                refit=refit,
                low=lowered.low,
                kept=lowered.kept,
                layer_types=built.layer_types,
                tensor_types=built.tensor_types,
                graph_error=error,
                error_limit=lowered.limit,
                seconds=built.seconds,
                command=_command(bundle, request, precision, model),
            )

        engine = add_engine(bundle, name, build, force=force)
    return Compiled(engine, lowered, plain.rebuilt, tuple(warnings))


def default_profile(bundle: Bundle, inputs: Sequence[TensorSpec], defaults: Mapping[str, Array]) -> dict[str, Sizes]:
    """Sizes of the dimensions that a deployfa graph has: batch, sequence (up to what the bundle's text is cut to), the
    rows of tables that are inputs (with room for more) and strengths (one for all, or one for each row)."""
    longest = bundle.manifest.preprocessing.max_length
    sizes = {
        "batch": _BATCH,
        "sequence": Sizes(1, min(_TUNED_SEQUENCE, longest), longest),
        "strengths": Sizes(1, 1, _BATCH.maximum),
    }
    if bundle.manifest.preprocessing.cache is not None:
        # one engine reads prompts and goes on from them
        tuned = min(_TUNED_SEQUENCE, longest)
        sizes |= {"sequence": Sizes(1, 1, longest), "kept": Sizes(1, 1, longest)}
        sizes |= {"past_sequence": Sizes(0, tuned, longest), "total_sequence": Sizes(1, tuned, longest)}
    for spec in inputs:
        if spec.name in defaults and spec.shape and spec.shape[0] == ADAPTERS:
            rows = len(defaults[spec.name])
            sizes[ADAPTERS] = Sizes(1, rows, max(_ROOM, 2 * rows))
    return sizes


def _check_sequence(bundle: Bundle, sizes: Mapping[str, Sizes]) -> None:
    longest = bundle.manifest.preprocessing.max_length
    if "sequence" in sizes and sizes["sequence"].maximum > longest:
        raise InputError(
            f"sequence={sizes['sequence']} is longer than the bundle's model reads; it cuts texts at {longest} tokens"
        )


def _cases(bundle: Bundle, plain: Unfused) -> list[Case]:
    """The stored reference, fed with the bundle's own adapter where that is a set of inputs."""
    cases = read_cases(bundle.reference)
    slots = bundle.manifest.slots
    if slots is None:
        return cases
    row = read_onnx_adapter(bundle.path / slots.file, slots.layout, idle_branch=slots.idle_branch)
    width = max([head.out_features for head in slots_of(bundle).layout.heads], default=0)
    known = {value.name for value in plain.model.graph.inputs}
    row = {name: array for name, array in row.items() if name in known}
    return [widened(dataclasses.replace(case, feeds={**row, **case.feeds}), width) for case in cases]


def _judge(bundle: Bundle, plain: Unfused) -> tuple[Judge, str | None]:
    """The stored reference, which ONNX Runtime is asked about; and why it cannot be, if so."""
    missing = None if find_spec("onnxruntime") is not None else "onnxruntime is not installed"
    return stored_judge(_cases(bundle, plain), plain.defaults, bundle.manifest.reference.noise), missing


def _checked(lowered: Lowered, judge: Judge, why_not: str | None) -> tuple[float | None, list[str]]:
    """Normwise relative error of the graph that will be built, and warnings.

    Raises ``RuntimeTargetError`` above the limit, and for an answer that is no finite number.
    """
    if why_not is None:
        try:
            error = judge.error(lowered.model)
        except RuntimeTargetError as refused:
            # bfloat16: ONNX Runtime has few kernels for it on the CPU
            why_not = str(refused)
        else:
            if not error <= lowered.limit:
                raise RuntimeTargetError(
                    f"in {lowered.precision} the graph differs from the reference by {error:.1e}, and may by "
                    f"{lowered.limit:.1e}; compile it with --precision fp32"
                )
            return error, []
    return None, [f"the graph was not held against the reference ({why_not}); verify the bundle on the device"]


def _signature(values: Sequence[ir.Value]) -> list[TensorSpec]:
    return [
        TensorSpec(
            value.name or "",
            value.dtype.numpy().name if value.dtype is not None else "",
            tuple(
                size if isinstance(size, int) else str(size.value or f"{value.name}_{axis}")
                for axis, size in enumerate(value.shape or ())
            ),
        )
        for value in values
    ]


def _named(model: ir.Model) -> list[NodePlace]:
    """Gives every node without a name one, for messages, and says which module each came from."""
    places = []
    for number, node in enumerate(model.graph):
        if not node.name:
            node.name = f"{node.op_type}_{number}"
        places.append(NodePlace(node.name, node.op_type, module_path_of(node.metadata_props.get(SCOPES)) or ""))
    return places


def _command(bundle: Bundle, request: BuildRequest, precision: str, model: str | Path | None) -> str:
    """What builds the same engine again."""
    words = ["deployfa", "compile", str(bundle.path), "--target", request.target, "--precision", precision]
    for name, sizes in request.profile.items():
        words += ["--profile", f"{name}={sizes}"]
    for capability in request.compute_capabilities:
        words += ["--compute-capability", capability]
    if request.workspace_bytes is not None:
        words += ["--workspace", str(request.workspace_bytes)]
    words += ["--tf32"] * request.tf32 + ["--refit"] * request.refit
    if request.level is not None:
        words += ["--level", str(request.level)]
    if model is not None:
        words += ["--model", str(model)]
    return shlex.join([*words, "--force"])
