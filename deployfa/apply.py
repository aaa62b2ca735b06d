"""Place an adapter on a graph that this project did not export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deployfa.adapter import Adapter
from deployfa.atomic import check_output, write_directory
from deployfa.checkpoint import weights_of
from deployfa.edits import Array, Edit
from deployfa.errors import InputError
from deployfa.graph import Plan, apply_adapter, make_plan
from deployfa.graph.locate import Located, locate_sites
from deployfa.graph.plan import Prefer, Preference
from deployfa.graph.storage import GRAPH, load_graph, save_graph

__all__ = ["PLAN", "SITES", "Applied", "ApplyReport", "LocatedSite", "apply_to_graph", "read_site_names"]

PLAN, SITES = "plan.json", "sites.json"


class LocatedSite(msgspec.Struct, frozen=True, kw_only=True):
    """Where a site was found in the graph, and how."""

    site: str
    weight: str
    nodes: list[str]
    how: str


class ApplyReport(msgspec.Struct, frozen=True, kw_only=True):
    """The schema of ``apply --json``."""

    out: str
    sites: list[LocatedSite]
    plan: Plan


@dataclass(frozen=True, eq=False)
class Applied:
    """A written graph."""

    folder: Path
    plan: Plan
    located: list[LocatedSite]


def apply_to_graph(
    graph: Path,
    adapter: Adapter,
    out: Path,
    *,
    named: Mapping[str, str] | None = None,
    model: Path | None = None,
    placement: Preference = "auto",
    prefer: Prefer = "smallest-patch",
    untie: bool = False,
    require_fold: bool = False,
    force: bool = False,
    status: Callable[[str], None] | None = None,
) -> Applied:
    """Write ``graph`` with ``adapter`` placed on it to the folder ``out``: model.onnx, plan.json, sites.json.

    ``named``: site → initializer or node name.  ``model``: directory of the adapter's base, whose weights find what
    names do not and are compared with what names found.  ``graph`` is not changed, and weights that no edit touches are
    copied from file to file.  Raises ``SiteError`` for a site that is not found or is ambiguous.
    """
    say = status or (lambda _: None)
    if out.suffix == ".onnx":
        raise InputError(f"a graph and its weights are two files, '{out}' is one; pass a folder: {out.with_suffix('')}")
    check_output(out, force=force, holding=GRAPH)
    for given in (graph, model):
        if given is not None and given.resolve().is_relative_to(out.resolve()):
            raise InputError(f"'{out}' holds '{given}', which --force would replace; pass another --out")
    base = load_graph(graph)
    say("finding the sites")
    wanted = {site: _size(edit) for site, edit in adapter.edits.items()}
    wanted |= {path: _head_size(parameters) for path, parameters in adapter.modules.items()}
    unknown = sorted(set(named or {}) - set(wanted))
    if unknown:
        raise InputError(f"--sites names '{unknown[0]}', which the adapter does not change; it has {min(wanted)}, …")
    weights = weights_of(model, list(adapter.edits)) if model is not None else None
    found, located = locate_sites(base, wanted, named=named, base=weights)
    say(f"placing {len(adapter.edits)} edits")
    plan = make_plan(found, adapter, placement=placement, prefer=prefer, untie=untie, require_fold=require_fold)
    adapted = apply_adapter(found, adapter, plan)
    sites = [_told(each) for each in located]
    say(f"writing '{out}'")
    with write_directory(out, force=force) as folder:
        save_graph(adapted, folder)
        (folder / PLAN).write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
        (folder / SITES).write_bytes(msgspec.json.format(msgspec.json.encode({s.site: s.weight for s in sites})))
    return Applied(out, plan, sites)


def read_site_names(path: Path) -> dict[str, str]:
    """``{site: initializer or node name}`` from a JSON file; raises ``InputError`` for anything else."""
    if not path.is_file():
        raise InputError(
            f'no file \'{path}\'; --sites takes a JSON file such as {{"encoder.layer.0.dense": "MatMul_12"}}'
        )
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not a JSON object of names ({error})") from error


def _told(each: Located) -> LocatedSite:
    return LocatedSite(site=each.site, weight=each.weight, nodes=each.nodes, how=each.how)


def _size(edit: Edit) -> tuple[int, int] | None:
    """(k, d) as far as an edit says; -1 for what it leaves open."""
    outputs = edit.output_low_rank.b if edit.output_low_rank is not None else edit.output_scale
    k, d = edit.in_features, None if outputs is None else int(outputs.shape[0])
    return (-1 if k is None else k, -1 if d is None else d)


def _head_size(parameters: Mapping[str, Array]) -> tuple[int, int] | None:
    weight = parameters.get("weight")
    return (weight.shape[1], weight.shape[0]) if weight is not None and weight.ndim == 2 else None
