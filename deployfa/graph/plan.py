"""Decide where each edit goes before anything is touched.

A placement is exact or it is refused with a named reason.  ``own weight`` and ``norm`` cost nothing at run time and are
taken wherever one is exact: the own weight first, because it binds no other site, or the norm first with
``prefer="smallest-patch"``, because two vectors are a smaller update than a matrix.  A ``side op`` is always exact and
costs what the plan says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.errors import PlanError, SiteError
from deployfa.graph.costs import Cost, norm_cost, own_weight_cost, side_op_cost
from deployfa.graph.norm import find_norm, norm_output, norm_readers, why_not_norm
from deployfa.graph.sites import Site, find_sites

__all__ = [
    "NORM",
    "OWN_WEIGHT",
    "SIDE_OP",
    "Plan",
    "PlannedEdit",
    "PlannedModule",
    "Prefer",
    "Preference",
    "make_plan",
    "sites_by_node",
    "why_not_own_weight",
]

OWN_WEIGHT: Final = "own weight"
NORM: Final = "norm"
SIDE_OP: Final = "side op"
Preference = Literal["auto", "fold", "side-op"]
Prefer = Literal["own-weight", "smallest-patch"]


class PlannedEdit(msgspec.Struct, frozen=True, kw_only=True):
    """Where one edit goes.  Costs are what the placement adds to the base graph, see ``deployfa.graph.costs.Cost``;
    ``extra_bytes`` is what the graph grows by, ``patch_bytes`` what an update has to ship."""

    site: str
    placement: Literal["own weight", "norm", "side op"]
    reason: str
    extra_flops_per_token: int
    extra_bytes_per_token: int
    extra_bytes: int
    patch_bytes: int
    in_features: int
    out_features: int
    op: str
    uses: int


class PlannedModule(msgspec.Struct, frozen=True, kw_only=True):
    """A whole module whose parameters replace the base's (a classifier head)."""

    path: str
    parameters: list[str]
    bytes: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The list of placements; frozen, printable, JSON, and enough to replay the rewrite."""

    edits: list[PlannedEdit]
    modules: list[PlannedModule]
    preference: str

    @property
    def extra_flops_per_token(self) -> int:
        return sum(edit.extra_flops_per_token for edit in self.edits)

    @property
    def extra_bytes(self) -> int:
        return sum(edit.extra_bytes for edit in self.edits)

    @property
    def extra_bytes_per_token(self) -> int:
        return sum(edit.extra_bytes_per_token for edit in self.edits)

    @property
    def patch_bytes(self) -> int:
        """What an update ships: every tensor that changes, replaced modules included."""
        return sum(edit.patch_bytes for edit in self.edits) + sum(module.bytes for module in self.modules)

    @property
    def folded(self) -> int:
        """Edits that cost nothing at run time."""
        return self.count(OWN_WEIGHT) + self.count(NORM)

    def count(self, placement: str) -> int:
        return sum(edit.placement == placement for edit in self.edits)


def make_plan(
    model: ir.Model,
    adapter: Adapter,
    *,
    placement: Preference = "auto",
    prefer: Prefer = "own-weight",
    require_fold: bool = False,
) -> Plan:
    """Plan every edit and replaced module of ``adapter`` on ``model``; nothing is changed.

    Raises ``SiteError`` for a site or module the graph lacks, ``EditError`` for one that does not fit, and
    ``PlanError`` with the reasons if ``require_fold`` and some edit cannot fold.
    """
    sites = find_sites(model)
    missing = sorted(set(adapter.edits) - set(sites))
    if missing:
        raise SiteError.unknown(missing, sites)
    for path, edit in adapter.edits.items():
        _check_edit(sites[path], edit)
    in_norms = _norm_sites(sites, adapter.edits, prefer) if placement != "side-op" else {}
    planned = [_plan_edit(sites[path], edit, placement, in_norms) for path, edit in adapter.edits.items()]
    if require_fold:
        refused = [edit for edit in planned if edit.placement == SIDE_OP]
        if refused:
            first, more = refused[0], f" and {len(refused) - 1} more" if len(refused) > 1 else ""
            raise PlanError(
                f"site '{first.site}'{more} cannot fold: {first.reason}; drop --require-fold to use a side op there"
            )
    return Plan(edits=planned, modules=_plan_modules(model, sites, adapter), preference=placement)


def sites_by_node(sites: Mapping[str, Site]) -> dict[ir.Node, Site]:
    """Node → the site that it runs."""
    return {use.node: site for site in sites.values() for use in site.uses}


def _check_edit(site: Site, edit: Edit) -> None:
    edit.check(site.path, site.in_features, site.out_features, site.kernel)
    if edit.delta is not None and any(use.pads_first for use in site.uses):
        raise PlanError(f"site '{site.path}': its module pads with zeros, which δ must not reach; train without δ")


def _norm_sites(sites: Mapping[str, Site], edits: Mapping[str, Edit], prefer: Prefer) -> dict[str, bool]:
    """Sites that fold into their norm → whether the site is the first of its norm.

    A norm is taken or left for all its sites together: taken where the smallest patch is preferred, and where the own
    weight of one of them is blocked.
    """
    nodes = sites_by_node(sites)
    groups: dict[ir.Value, list[str]] = {}
    for path in edits:
        if why_not_norm(sites[path], nodes, edits) is None:
            groups.setdefault(norm_output(sites[path]), []).append(path)
    chosen: dict[str, bool] = {}
    for paths in groups.values():
        if prefer == "smallest-patch" or any(why_not_own_weight(sites[path], edits[path]) for path in paths):
            chosen |= {path: number == 0 for number, path in enumerate(paths)}
    return chosen


def _plan_edit(site: Site, edit: Edit, preference: Preference, in_norms: Mapping[str, bool]) -> PlannedEdit:
    placement: Literal["own weight", "norm", "side op"]
    if preference == "side-op":
        placement, reason, cost = SIDE_OP, "asked for with --placement side-op", side_op_cost(site, edit)
    elif site.path in in_norms:
        placement, reason, cost = NORM, *_in_norm(site, edit, first=in_norms[site.path])
    elif (blocked := why_not_own_weight(site, edit)) is not None:
        placement, reason, cost = SIDE_OP, blocked, side_op_cost(site, edit)
    else:
        cost = own_weight_cost(site, edit)
        placement, reason = OWN_WEIGHT, f"folds into its own weight{cost.note}"
    return PlannedEdit(
        site=site.path,
        placement=placement,
        reason=reason,
        extra_flops_per_token=cost.flops,
        extra_bytes_per_token=cost.traffic_bytes,
        extra_bytes=cost.stored_bytes,
        patch_bytes=cost.patch_bytes,
        in_features=site.in_features,
        out_features=site.out_features,
        op=site.uses[0].node.op_type,
        uses=len(site.uses),
    )


def _in_norm(site: Site, edit: Edit, *, first: bool) -> tuple[str, Cost]:
    norm = find_norm(site)
    assert norm is not None  # why_not_norm has looked
    readers = len(norm_readers(site))
    blocked = why_not_own_weight(site, edit)
    reason = "folds into its norm" + (f", with {readers - 1} more on it" if readers > 1 else "")
    return reason + (f"; {blocked}" if blocked else ""), norm_cost(norm, first=first)


def why_not_own_weight(site: Site, edit: Edit) -> str | None:
    """The fact that blocks the fold, by name; ``None`` if the fold is exact."""
    value = site.weight
    if value.is_graph_input():
        return "weight is a graph input"
    if value.const_value is None:
        return "weight is computed in the graph"
    if value.dtype is not None and not value.dtype.is_floating_point():
        return f"weight is quantised ({value.dtype.name.lower()})"
    if any(node.op_type == "Gather" for node in value.consumers()):
        return "weight is tied to the embedding"
    low_rank = edit.input_low_rank is not None or edit.output_low_rank is not None
    if site.groups != 1 and low_rank:
        return "low rank before a grouped convolution"
    if edit.delta is None:
        return None
    if any(use.zero_padding for use in site.uses):
        return "δ before a zero-padded convolution"
    for bias in (use.bias for use in site.uses if use.bias is not None):
        if bias.is_graph_input():
            return "bias is a graph input"
        if bias.const_value is None:
            return "bias is computed in the graph"
        if bias.const_value.size not in {1, site.out_features}:
            return "bias differs by position"
    return None


def _plan_modules(model: ir.Model, sites: dict[str, Site], adapter: Adapter) -> list[PlannedModule]:
    planned = []
    for path, parameters in adapter.modules.items():
        for name in parameters:
            if path not in sites and f"{path}.{name}" not in model.graph.initializers:
                known = sorted(
                    set(sites) | {n.removesuffix(".T").rpartition(".")[0] for n in model.graph.initializers if "." in n}
                )
                raise SiteError.unknown([path], known)
        size = sum(array.nbytes for array in parameters.values())
        planned.append(PlannedModule(path=path, parameters=sorted(parameters), bytes=size))
    return planned
