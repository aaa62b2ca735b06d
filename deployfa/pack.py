"""Many adapters of one base in one bundle: every row of a batch runs its own."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter, BaseReference
from deployfa.atomic import check_output
from deployfa.base_graphs import BaseGraph, base_graph
from deployfa.bench import Shape
from deployfa.bundle import Bundle
from deployfa.bundle.manifest import MANIFEST, AdapterSummary, Tables
from deployfa.data import Row
from deployfa.edits import Array
from deployfa.errors import BaseMismatchError, DeployfaError, InputError
from deployfa.fusion import choose_fusion
from deployfa.graph import Plan
from deployfa.graph.row_defaults import attach_defaults, bake, default_strength
from deployfa.graph.row_layout import answer_width, base_heads, base_weights, make_layout
from deployfa.graph.row_ops import ADAPTER_IDS, add_tables
from deployfa.kept_fusions import compare_fusions
from deployfa.parity.mixed import mixed_truth
from deployfa.parity.other import Other
from deployfa.pipeline import (
    DEFAULT_SHAPES,
    Content,
    check_effect,
    check_export_options,
    reference_preprocessor,
    write_bundle,
)
from deployfa.tables import Layout, Member, base_row, row_of, write_fleet
from deployfa.tables.checks import check_name
from deployfa.tables.lease import unknown_name
from deployfa.tables.row import check_fingerprint

__all__ = ["FLEET", "Packed", "other_in_pack", "pack"]

FLEET = "adapters.safetensors"
Values = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Packed:
    """A written pack; ``checked``: the adapters whose rows the stored reference holds."""

    bundle: Bundle
    layout: Layout
    checked: tuple[str, ...]
    ran_torch: bool
    warnings: tuple[str, ...]


def pack(
    adapters: Mapping[str, Adapter],
    out: Path,
    *,
    model: str | Path | None = None,
    target: str = "onnxruntime-cpu",
    optimize: str = "auto",
    table_inputs: bool = False,
    max_rank: int = 0,
    max_labels: int = 0,
    shapes: Sequence[Shape] = DEFAULT_SHAPES,
    rows: Sequence[Row] | None = None,
    check: int = 16,
    threads: int | None = None,
    force: bool = False,
    allow_base_mismatch: bool = False,
    status: Callable[[str], None] | None = None,
) -> Packed:
    """Write a bundle whose graph takes ``adapter_ids`` (batch,), row i of the table for the i-th of ``adapters``, 0 for
    the base; whole or not at all.

    adapters may be read when asked for; each is asked for at most four times.  table_inputs: leave the tables out of
    the graph, in a file of their own that is bound to the session, so that adapters can be added without a new one.
    ``max_rank``, ``max_labels``: room for those.  check: how many adapters the stored reference holds, spread over all.
    Raises ``InputError`` on names that cannot be, ``BaseMismatchError`` on adapters of different bases, and
    ``SiteError``, ``EditError`` or ``PlanError``, naming the adapter, where one does not fit.
    """
    say = status or (lambda _: None)
    optimize = check_export_options(target, optimize)
    if check < 1:
        raise InputError(f"check is {check}; pass 1 or more adapters to hold against their truth")
    check_output(out, force=force, holding=MANIFEST)
    names = list(adapters)
    _check_names(names)
    say(f"reading {len(names)} adapters")
    first = adapters[names[0]]
    base = base_graph(first, model=model, allow_mismatch=allow_base_mismatch, status=status)
    graph = base.load()
    layout = make_layout(graph, adapters, max_rank=max_rank, max_labels=max_labels)
    _check_bases(adapters, names, base, model, allow_base_mismatch)
    zero, weights = base_row(layout, base_heads(graph, layout)), base_weights(graph, layout)
    members = [Member(name="base", method="base", labels=tuple(base.labels))]
    members += [_member(name, adapters[name], base) for name in names]

    def rows_of(chosen: Iterable[str]) -> Iterator[Values]:
        yield zero
        for name in chosen:
            try:
                yield row_of(adapters[name], layout, zero, weights=weights, allow_mismatch=allow_base_mismatch)
            except DeployfaError as error:
                raise type(error)(f"adapter '{name}': {error}") from error

    tables = add_tables(graph, layout)
    preprocessor = reference_preprocessor(base)
    chosen_rows = sorted({*np.linspace(1, len(names), min(check, len(names))).round().astype(int).tolist()})
    cases, noise = mixed_truth(
        graph,
        {row: partial(adapters.__getitem__, names[row - 1]) for row in chosen_rows},
        preprocessor,
        [row.item for row in rows] if rows else preprocessor.samples,
        labels=answer_width(graph, layout),
        silent=lambda _, adapter, cases, noise: check_effect(adapter, cases, noise),
        status=say,
    )
    # judged and timed with the rows that the cases use, under numbers of their own
    small = _stacked(layout, rows_of(names[row - 1] for row in chosen_rows))
    numbers = np.zeros(len(members), np.int64)
    numbers[chosen_rows] = np.arange(1, len(chosen_rows) + 1)
    judged = [
        dataclasses.replace(case, feeds={**case.feeds, ADAPTER_IDS: numbers[case.feeds[ADAPTER_IDS]]}) for case in cases
    ]
    with tempfile.TemporaryDirectory(prefix="deployfa-pack-") as scratch:
        optimization, fused = choose_fusion(
            tables,
            optimize,
            judged,
            noise,
            shapes,
            Path(scratch),
            threads=threads,
            finish=partial(_baked, values=small),
            status=say,
        )
    say("counting what the runtime fuses")
    fusions = compare_fusions(graph, tables, optimization.chosen, fused=fused)
    say(f"writing '{out}'")
    fused = fused.clone()
    attach_defaults(fused, default_strength())
    if not table_inputs:
        bake(fused, _stacked(layout, rows_of(names)))
    content = Content(
        adapter=_nobody(first, base),
        base=base,
        plan=Plan(edits=[], modules=[], preference="auto"),
        fused=fused,
        optimization=optimization,
        fusions=fusions,
        target=target,
        cases=cases,
        noise=noise,
        tables=Tables(
            layout=layout,
            adapters=members,
            inputs=table_inputs,
            file=FLEET if table_inputs else None,
            replaced={
                path: {name: list(array.shape) for name, array in module.items()}
                for path, module in first.modules.items()
            },
        ),
        summary=_summary(layout, members),
        write=lambda folder: write_fleet(folder / FLEET, layout, members, rows_of(names)) if table_inputs else None,
    )
    bundle = write_bundle(out, content, force=force)
    return Packed(bundle, layout, tuple(names[row - 1] for row in chosen_rows), base.made_now, tuple(base.warnings))


def other_in_pack(bundle: Bundle, name: str, adapter: Adapter, *, allow_base_mismatch: bool = False) -> Other:
    """``adapter``, which the pack ``bundle`` holds as ``name``, to be verified by itself.

    Raises ``InputError`` if there is no such name, or no pack, and ``BaseMismatchError`` on another base.
    """
    tables = bundle.manifest.tables
    if tables is None:
        raise InputError(f"'{bundle.path}' holds one adapter; make a pack with: deployfa pack")
    members = {member.name: (row, member) for row, member in enumerate(tables.adapters)}
    if name not in members:
        raise unknown_name(name, list(members))
    check_fingerprint(adapter, tables.layout, allow_mismatch=allow_base_mismatch)
    row, member = members[name]
    return Other(name, adapter, member.labels, adapter.base, row=row, allow_mismatch=allow_base_mismatch)


def _baked(model: ir.Model, *, values: Values) -> ir.Model:
    """A copy with ``values`` as its tables, the whole graph in one file."""
    whole = model.clone()
    attach_defaults(whole, default_strength())
    bake(whole, values)
    return whole


def _stacked(layout: Layout, rows: Iterable[Values]) -> Values:
    """Rows → tables: tensor → (N, *its shape in one row)."""
    parts: dict[str, list[Array]] = {name: [] for name in layout.shapes()}
    for row in rows:
        for name, array in row.items():
            parts[name].append(array)
    return {name: np.stack(arrays) for name, arrays in parts.items()}


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise InputError("no adapters to pack; name at least one")
    for name in names:
        check_name(name)


def _check_bases(
    adapters: Mapping[str, Adapter],
    names: Sequence[str],
    base: BaseGraph,
    model: str | Path | None,
    allow_mismatch: bool,
) -> None:
    """One base for all.  Modules that an adapter replaces are left out of its base's fingerprint, so adapters that
    replace different ones name different fingerprints of one base: each of those is compared by loading the base."""
    known: dict[tuple[str, ...], str] = {}
    for name in names:
        adapter = adapters[name]
        replaced = tuple(sorted(adapter.modules))
        if replaced not in known:
            known[replaced] = base.fingerprint if not known else _fingerprint(adapter, model or base.name)
        warning = None
        try:
            warning = adapter.check_base(known[replaced], allow_mismatch=allow_mismatch)
        except BaseMismatchError as error:
            raise BaseMismatchError(f"adapter '{name}': {error}") from error
        if warning and not allow_mismatch:
            raise BaseMismatchError(f"adapter '{name}': {warning}; pass --allow-base-mismatch if it is the right one")


def _fingerprint(adapter: Adapter, model: str | Path) -> str:
    """That of ``model`` without what ``adapter`` replaces."""
    return base_graph(adapter, model=model).fingerprint


def _member(name: str, adapter: Adapter, base: BaseGraph) -> Member:
    labels = adapter.labels or (() if adapter.modules else tuple(base.labels))
    return Member(name=name, method=adapter.method, labels=tuple(labels), parameters=adapter.parameters)


def _nobody(first: Adapter, base: BaseGraph) -> Adapter:
    """The pack's place in what is written for one adapter."""
    reference = BaseReference(
        name=base.name, fingerprint=base.fingerprint, architecture=base.architecture, task=first.base.task
    )
    return Adapter("pack", {}, base=reference)


def _summary(layout: Layout, members: Sequence[Member]) -> AdapterSummary:
    methods = sorted({member.method for member in members[1:]})
    return AdapterSummary(
        method=f"pack of {len(members) - 1}: {', '.join(methods)}",
        sites=len(layout.sites()),
        parameters=sum(member.parameters for member in members),
        module_parameters=0,
        training={},
    )
