"""Decide where each edit goes before anything is touched.

A placement is exact or it is refused with a named reason.  ``own weight``, ``norm`` and ``producer`` cost nothing at
run time and are taken wherever one is exact; among them the one that changes the fewest bytes, or with
``prefer="own-weight"`` the layer's own weight, which binds no other site.  A ``side op`` is always exact and costs what
the plan says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.errors import PlanError, SiteError
from deployfa.graph.costs import Cost, cheaper_form, own_weight_cost, side_op_cost
from deployfa.graph.norm import Norm
from deployfa.graph.own_weight import why_not_own_weight
from deployfa.graph.side_op import Form, digest
from deployfa.graph.sites import Site, find_sites
from deployfa.graph.upstream import Group, Upstream, find_upstream

__all__ = [
    "NORM",
    "OWN_WEIGHT",
    "PRODUCER",
    "SIDE_OP",
    "Placement",
    "Plan",
    "PlannedEdit",
    "PlannedModule",
    "Prefer",
    "Preference",
    "beside",
    "make_plan",
]

OWN_WEIGHT: Final = "own weight"
NORM: Final = "norm"
PRODUCER: Final = "producer"
SIDE_OP: Final = "side op"
Placement = Literal["own weight", "norm", "producer", "side op"]
Preference = Literal["auto", "fold", "side-op"]
Prefer = Literal["smallest-patch", "own-weight"]


class PlannedEdit(msgspec.Struct, frozen=True, kw_only=True):
    """Where one edit goes.  Costs are what the placement adds to the base graph, see ``deployfa.graph.costs.Cost``;
    ``extra_bytes`` is what the graph grows by, ``patch_bytes`` what an update has to ship.

    ``into``: what an upstream fold changes; ``form``: where a side op adds a LoRFA's product.
    """

    site: str
    placement: Placement
    reason: str
    extra_flops_per_token: int
    extra_bytes_per_token: int
    extra_bytes: int
    patch_bytes: int
    in_features: int
    out_features: int
    op: str
    uses: int
    into: str = ""
    form: Form = "input"


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
    untie: bool = False

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
        return sum(edit.placement != SIDE_OP for edit in self.edits)

    def count(self, placement: str) -> int:
        return sum(edit.placement == placement for edit in self.edits)


def make_plan(
    model: ir.Model,
    adapter: Adapter,
    *,
    placement: Preference = "auto",
    prefer: Prefer = "smallest-patch",
    untie: bool = False,
    require_fold: bool = False,
) -> Plan:
    """Plan every edit and replaced module of ``adapter`` on ``model``; nothing is changed.

    ``untie``: give a weight that is tied to the embedding a copy of its own where nothing else folds.  Raises
    ``SiteError`` for a site or module the graph lacks, ``EditError`` for one that does not fit, and ``PlanError`` with
    the reasons if ``require_fold`` and some edit cannot fold.
    """
    sites = find_sites(model)
    missing = sorted(set(adapter.edits) - set(sites))
    if missing:
        raise SiteError.unknown(missing, sites)
    for path, edit in adapter.edits.items():
        _check_edit(sites[path], edit)
    if placement == "side-op":
        planned = _SideOps().plan(sites, dict.fromkeys(adapter.edits, "asked for with --placement side-op"), adapter)
    else:
        planned = _plan_folds(model.graph, sites, adapter.edits, prefer, untie)
    if require_fold:
        _require_folds(planned)
    ordered = [planned[path] for path in adapter.edits]
    return Plan(edits=ordered, modules=_plan_modules(model, sites, adapter), preference=placement, untie=untie)


def beside(edits: Mapping[str, Edit], side_ops: set[str]) -> dict[str, str]:
    """Sites whose output gets something added beside the layer: a fold into their rows would miss it."""
    return {
        path: "has a LoRA beside it" for path in side_ops if path in edits and edits[path].output_low_rank is not None
    }


def _taken(sites: Mapping[str, Site], edits: Mapping[str, Edit], side_ops: set[str]) -> dict[str, str]:
    """Sites whose one scale becomes one for each input, after which their rows have none."""
    return {
        path: "is quantised with one scale, which its own 1+λ takes"
        for path, edit in edits.items()
        if path not in side_ops
        and edit.lam is not None
        and any(use.weight.scales is not None and use.weight.scales.single for use in sites[path].uses)
    }


def _plan_folds(
    graph: ir.Graph, sites: Mapping[str, Site], edits: Mapping[str, Edit], prefer: Prefer, untie: bool
) -> dict[str, PlannedEdit]:
    """Every edit: upstream where that is the better fold, into its own weight where it is exact, else a side op."""
    blocked = {path: why_not_own_weight(sites[path], edit) for path, edit in edits.items()}
    unfolded = {path for path, reason in blocked.items() if reason is not None}
    busy = _taken(sites, edits, unfolded) | beside(edits, unfolded)
    upstream = find_upstream(graph, sites, edits, busy=busy)
    planned: dict[str, PlannedEdit] = {}
    for path, group in upstream.groups.items():
        if path in planned or not _better(group, sites, edits, blocked, prefer):
            continue
        for number, member in enumerate(group.sites):
            planned[member] = _upstream(sites[member], group, blocked[member], first=number == 0)
    side_ops: dict[str, str] = {}
    for path, edit in edits.items():
        reason = blocked[path]
        if reason is not None and untie and sites[path].weight.embeds:
            reason = why_not_own_weight(sites[path], edit, untie=True)
        if path in planned:
            continue
        if reason is not None:
            side_ops[path] = _both_reasons(reason, upstream, path, sites[path])
        else:
            cost = own_weight_cost(sites[path], edit)
            planned[path] = _planned(sites[path], OWN_WEIGHT, f"folds into its own weight{cost.note}", cost)
    return planned | _SideOps().plan(sites, side_ops, edits)


def _better(
    group: Group,
    sites: Mapping[str, Site],
    edits: Mapping[str, Edit],
    blocked: Mapping[str, str | None],
    prefer: Prefer,
) -> bool:
    """Whether a group folds upstream: where one of its own weights cannot, or where that is the smaller patch.

    A group is taken or left for all its sites together.
    """
    if any(blocked[path] is not None for path in group.sites):
        return True
    if prefer == "own-weight":
        return False
    own = [own_weight_cost(sites[path], edits[path]) for path in group.sites]
    if any(cost.flops for cost in own):
        return True
    return group.bytes < sum(cost.patch_bytes for cost in own)


def _upstream(site: Site, group: Group, blocked: str | None, *, first: bool) -> PlannedEdit:
    end = next(path.end for name, path in group.paths if name == site.path)
    others = len(group.sites) - 1
    together = f", with {others} more on it" if others else ""
    if isinstance(end, Norm):
        placement: Placement = NORM
        into = end.node.name or end.node.op_type
        reason = f"folds into its norm{together}"
    else:
        placement = PRODUCER
        into = end.weight.name
        way = " through attention" if any(op in {"MatMul", "Attention"} for op in group.through) else ""
        into_what = "scales of the rows" if end.weight.quantised else "rows"
        reason = f"folds into the {into_what} of the layer before{way}{together}"
    reason += f"; {blocked}" if blocked else ""
    cost = Cost(patch_bytes=group.bytes if first else 0)
    return _planned(site, placement, reason, cost, into=into)


def _both_reasons(reason: str, upstream: Upstream, path: str, site: Site) -> str:
    above = upstream.reasons.get(path)
    return reason if above is None or above.startswith(("low rank", "it scales")) else f"{reason}; {above}"


class _SideOps:
    """Plans side ops; the second of two equal ones on one tensor costs nothing."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], str] = {}

    def plan(
        self, sites: Mapping[str, Site], reasons: Mapping[str, str], edits: Mapping[str, Edit] | Adapter
    ) -> dict[str, PlannedEdit]:
        by_site = edits.edits if isinstance(edits, Adapter) else edits
        return {path: self._one(sites[path], by_site[path], reason) for path, reason in reasons.items()}

    def _one(self, site: Site, edit: Edit, reason: str) -> PlannedEdit:
        form = cheaper_form(site, edit)
        key = (id(site.uses[0].input), digest(edit, conv=site.convolves))
        owner = self._seen.setdefault(key, site.path)
        cost = side_op_cost(site, edit, form)
        alone = edit.output_low_rank is not None or edit.output_scale is not None
        if owner != site.path and form == "input" and not alone:
            reason, cost = f"{reason}; shares the side op of '{owner}'", Cost()
        elif form == "output":
            reason += "; adds the low rank to the output, as (W B)(A x), which is cheaper"
        return _planned(site, SIDE_OP, reason, cost, form=form)


def _planned(
    site: Site, placement: Placement, reason: str, cost: Cost, *, into: str = "", form: Form = "input"
) -> PlannedEdit:
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
        op=site.op,
        uses=len(site.uses),
        into=into,
        form=form,
    )


def _check_edit(site: Site, edit: Edit) -> None:
    edit.check(site.path, site.in_features, site.out_features, site.kernel)
    if edit.delta is not None and any(use.pads_first for use in site.uses):
        raise PlanError(f"site '{site.path}': its module pads with zeros, which δ must not reach; train without δ")
    if edit.output_low_rank is not None and site.layout == "conv transpose":
        raise PlanError(f"site '{site.path}': a LoRA of a transposed convolution has no form here; merge it with PEFT")


def _require_folds(planned: Mapping[str, PlannedEdit]) -> None:
    refused = [edit for edit in planned.values() if edit.placement == SIDE_OP]
    if refused:
        first, more = refused[0], f" and {len(refused) - 1} more" if len(refused) > 1 else ""
        untie = "; --untie gives it a weight of its own" if "tied to the embedding" in first.reason else ""
        raise PlanError(
            f"site '{first.site}'{more} cannot fold: {first.reason}; drop --require-fold to use a side op there{untie}"
        )


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
