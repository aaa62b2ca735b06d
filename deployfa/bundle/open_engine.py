"""Open what a bundle runs as on a target: its graph, or an engine, which is loaded only if all of it is vouched for."""

from __future__ import annotations

import numpy as np

from deployfa.bundle.bundle import Bundle
from deployfa.bundle.engines import engine_of, read_engine
from deployfa.bundle.slots import idle_row, slots_of
from deployfa.cache import cache_dir
from deployfa.edits import Array
from deployfa.errors import BundleError, InputError
from deployfa.graph.row_defaults import default_strength
from deployfa.runtimes.runner import Runner, Spinning
from deployfa.runtimes.slots import SlotRunner
from deployfa.runtimes.targets import is_engine, open_runner
from deployfa.runtimes.tensorrt.record import EngineRecord
from deployfa.runtimes.tensorrt.runner import EngineRunner

__all__ = ["engine_defaults", "open_bundle", "open_engine", "open_slots"]


def open_bundle(
    bundle: Bundle,
    target: str,
    *,
    engine: str | None = None,
    threads: int | None = None,
    spinning: Spinning = True,
    optimize: bool = True,
) -> Runner:
    """``bundle`` on ``target``, its patch and its tables with it.  engine: which one, where there are several."""
    if is_engine(target):
        return open_engine(bundle, target, name=engine)
    return open_runner(
        target,
        bundle.graph,
        threads=threads,
        spinning=spinning,
        optimize=optimize,
        initializers=bundle.initializers,
        bound=bundle.bound,
    )


def open_engine(
    bundle: Bundle, target: str, *, name: str | None = None, device: int = 0, cuda_graphs: bool = False
) -> EngineRunner:
    """The engine of ``bundle`` for ``target`` on GPU ``device``; its slots are empty, its tables the pack's.

    A run may be fed another adapter: a copy of kilobytes, no refit, no rebuild.  Raises what ``read_engine`` and
    ``EngineRunner`` raise, and ``InputError`` for a bundle with a patch.
    """
    if bundle.patch is not None:
        raise InputError("an engine takes no patch; compile the adapter's own bundle, or one exported with --slots")
    record = engine_of(bundle, target, name)
    plan = read_engine(bundle, record)
    return EngineRunner(
        plan,
        record,
        device=device,
        cuda_graphs=cuda_graphs,
        defaults=engine_defaults(bundle, record),
        runtime_cache=cache_dir() / "runtime-kernels" / f"{record.sha256[:16]}.cache",
    )


def open_slots(
    bundle: Bundle,
    *,
    target: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    spinning: Spinning = True,
    optimize: bool = True,
) -> SlotRunner:
    """A session of ``bundle``, the adapter it was exported with active until another is swapped in.

    target: of ``deployfa.runtimes.targets``, by default the bundle's own; engine: which one, where there are several.
    """
    slots = slots_of(bundle)
    target = target or bundle.manifest.target
    if is_engine(target):
        compiled = open_engine(bundle, target, name=engine)
        runner = SlotRunner(bundle.graph, slots.layout, runner=compiled, files_idle=slots.idle_branch)
    else:
        runner = SlotRunner(
            bundle.graph, slots.layout, target=target, threads=threads, spinning=spinning, optimize=optimize
        )
    if not is_engine(target) and runner.idle_branch != slots.idle_branch:
        raise BundleError(f"the graph of '{bundle.path}' is not the one of its manifest; export it again")
    runner.swap(runner.load(bundle.path / slots.file, labels=bundle.labels))
    return runner


def engine_defaults(bundle: Bundle, record: EngineRecord) -> dict[str, Array]:
    """What the optional inputs of an engine hold unless a run is fed others: name → array."""
    known: dict[str, Array] = {**default_strength()}
    if bundle.manifest.slots is not None:
        known |= idle_row(bundle)
    known |= {name: np.ascontiguousarray(array) for name, array in bundle.bound.items()}
    return {name: known[name] for name in record.optional}
