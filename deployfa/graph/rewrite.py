"""Apply a plan to a clone of the graph, and prove that nothing of the adapter was left over."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.errors import LeftoverError, PlanError, SiteError
from deployfa.graph.own_weight import fold_into_own_weight, why_not_own_weight
from deployfa.graph.plan import NORM, OWN_WEIGHT, PRODUCER, SIDE_OP, Plan, beside
from deployfa.graph.replace import replace_module
from deployfa.graph.side_op import SideOps
from deployfa.graph.sites import Site, find_sites
from deployfa.graph.tensors import drop_unused
from deployfa.graph.upstream import Group, find_upstream, fold_upstream

__all__ = ["apply_adapter"]


def apply_adapter(model: ir.Model, adapter: Adapter, plan: Plan) -> ir.Model:
    """A new model with ``adapter`` placed as ``plan`` says; ``model`` and ``adapter`` stay as they were.

    Weights that no placement touches are shared with ``model``, not copied.  Raises ``LeftoverError`` and names the
    tensors if the plan does not consume the whole adapter (promise 1), and ``SiteError``, ``EditError`` or
    ``PlanError`` if the plan was made for another adapter or another graph.
    """
    _check_consumed(adapter, plan)
    result = model.clone()
    graph = result.graph
    # replaced modules first: an edit of a replaced module changes the new weights, as it does in PyTorch
    sites = find_sites(result)
    for module in plan.modules:
        replace_module(graph, sites, module.path, adapter.modules[module.path])
    sites = find_sites(result)
    missing = {planned.site for planned in plan.edits} - set(sites)
    if missing:
        raise SiteError.unknown(missing, sites)
    for planned in plan.edits:
        site = sites[planned.site]
        adapter.edits[planned.site].check(site.path, site.in_features, site.out_features, site.kernel)
    # own weights, then what is upstream (a layer may be both a site and the producer of another; its own LoRA is then
    # scaled with it), then side ops, whose output form multiplies with the weight as it is by then
    _fold_own_weights(graph, sites, adapter, plan)
    _fold_upstream(result, adapter, plan)
    sites = find_sites(result)
    SideOps(graph).place(
        [(sites[each.site], adapter.edits[each.site], each.form) for each in plan.edits if each.placement == SIDE_OP]
    )
    drop_unused(graph)
    return result


def _fold_own_weights(graph: ir.Graph, sites: Mapping[str, Site], adapter: Adapter, plan: Plan) -> None:
    for planned in plan.edits:
        if planned.placement != OWN_WEIGHT:
            continue
        site, edit = sites[planned.site], adapter.edits[planned.site]
        blocked = why_not_own_weight(site, edit, untie=plan.untie)
        if blocked:
            raise PlanError(f"site '{site.path}' cannot fold as the plan says: {blocked}; make a new plan")
        fold_into_own_weight(graph, site, edit)


def _fold_upstream(model: ir.Model, adapter: Adapter, plan: Plan) -> None:
    """Every group once, for all its sites."""
    for placement in (NORM, PRODUCER):
        wanted = {each.site: adapter.edits[each.site] for each in plan.edits if each.placement == placement}
        if not wanted:
            continue
        side_ops = {each.site for each in plan.edits if each.placement == SIDE_OP}
        found = find_upstream(
            model.graph, find_sites(model), wanted, busy=beside(adapter.edits, side_ops), kinds=(placement,)
        )
        done: list[Group] = []
        for path in wanted:
            group = found.groups.get(path)
            if group is None:
                reason = found.reasons.get(path, "its group differs")
                raise PlanError(
                    f"site '{path}' cannot fold into its {placement} as the plan says: {reason}; make a new plan"
                )
            if group not in done:
                done.append(group)
                fold_upstream(model.graph, group)


def _check_consumed(adapter: Adapter, plan: Plan) -> None:
    planned_sites = [edit.site for edit in plan.edits]
    foreign = {*planned_sites} - {*adapter.edits} | {module.path for module in plan.modules} - {*adapter.modules}
    if foreign:
        raise PlanError(f"the plan names '{min(foreign)}', which the adapter does not change; make a new plan for it")
    if len(planned_sites) != len(set(planned_sites)):
        raise PlanError("the plan places one edit twice; make a new plan")
    consumed = {f"edit/{edit.site}/{name}" for edit in plan.edits for name in adapter.edits[edit.site].tensors()}
    consumed |= {f"module/{module.path}/{name}" for module in plan.modules for name in module.parameters}
    left = sorted(set(adapter.tensors()) - consumed)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise LeftoverError(f"the plan leaves '{left[0]}'{more} of the adapter unused; make a new plan for it")
