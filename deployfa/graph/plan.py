"""Decide where each edit goes before anything is touched.

A placement is exact or it is refused with a named reason.  ``own weight`` costs nothing at run time, so it is taken
wherever it is exact; a ``side op`` is always exact and costs what the plan says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Edit
from deployfa.errors import PlanError, SiteError
from deployfa.graph.sites import Site, find_sites

__all__ = [
    "OWN_WEIGHT",
    "SIDE_OP",
    "Plan",
    "PlannedEdit",
    "PlannedModule",
    "Preference",
    "make_plan",
    "why_not_own_weight",
]

OWN_WEIGHT: Final = "own weight"
SIDE_OP: Final = "side op"
Preference = Literal["auto", "fold", "side-op"]


class PlannedEdit(msgspec.Struct, frozen=True, kw_only=True):
    """Where one edit goes.  Costs are what the placement adds to the base graph."""

    site: str
    placement: Literal["own weight", "side op"]
    reason: str
    extra_flops_per_token: int
    extra_bytes: int
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

    def count(self, placement: str) -> int:
        return sum(edit.placement == placement for edit in self.edits)


def make_plan(model: ir.Model, adapter: Adapter, *, placement: Preference = "auto", require_fold: bool = False) -> Plan:
    """Plan every edit and replaced module of ``adapter`` on ``model``; nothing is changed.

    Raises ``SiteError`` for a site or module the graph lacks, ``EditError`` for one that does not fit, and
    ``PlanError`` with the reasons if ``require_fold`` and some edit cannot fold.
    """
    sites = find_sites(model)
    missing = sorted(set(adapter.edits) - set(sites))
    if missing:
        raise SiteError.unknown(missing, sites)
    planned = [_plan_edit(sites[path], edit, placement) for path, edit in adapter.edits.items()]
    if require_fold:
        refused = [edit for edit in planned if edit.placement == SIDE_OP]
        if refused:
            first, more = refused[0], f" and {len(refused) - 1} more" if len(refused) > 1 else ""
            raise PlanError(
                f"site '{first.site}'{more} cannot fold: {first.reason}; drop --require-fold to use a side op there"
            )
    return Plan(edits=planned, modules=_plan_modules(model, sites, adapter), preference=placement)


def _plan_edit(site: Site, edit: Edit, preference: Preference) -> PlannedEdit:
    edit.check(site.path, site.in_features, site.out_features, site.kernel)
    if edit.delta is not None and any(use.pads_first for use in site.uses):
        raise PlanError(f"site '{site.path}': its module pads with zeros, which δ must not reach; train without δ")
    blocked = "asked for with --placement side-op" if preference == "side-op" else why_not_own_weight(site, edit)
    itemsize = int(site.weight.dtype.itemsize) if site.weight.dtype is not None else 4
    if blocked is None:
        reason, flops, size = _own_weight_cost(site, edit, itemsize)
    else:
        reason, flops, size = blocked, _side_op_flops(site, edit), int(_side_op_numbers(edit) * itemsize)
    return PlannedEdit(
        site=site.path,
        placement=OWN_WEIGHT if blocked is None else SIDE_OP,
        reason=reason,
        extra_flops_per_token=flops,
        extra_bytes=size,
        in_features=site.in_features,
        out_features=site.out_features,
        op=site.uses[0].node.op_type,
        uses=len(site.uses),
    )


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


def _own_weight_cost(site: Site, edit: Edit, itemsize: int) -> tuple[str, int, int]:
    """A fold costs nothing at run time; a shared weight costs its own copy, a new bias one addition per output."""
    flops = size = 0
    reason = "folds into its own weight"
    ours = {use.node for use in site.uses}
    if any(node not in ours for node in site.weight.consumers()):
        reason += "; its own copy, the initializer is shared"
        size += itemsize * int(_product(site.shape))
    if edit.delta is not None and any(use.bias is None for use in site.uses):
        reason += "; adds a bias for δ"
        size += itemsize * site.out_features
        # Gemm and Conv take a bias for free; after a MatMul it is an Add of its own
        flops += site.out_features if site.uses[0].node.op_type == "MatMul" else 0
    return reason, flops, size


def _side_op_flops(site: Site, edit: Edit) -> int:
    """Multiplications and additions per token (per position for a convolution) of the nodes a side op adds."""
    k, d = site.in_features, site.out_features
    flops = 0
    if edit.lam is not None:
        flops += k
    if edit.delta is not None:
        flops += k
    if edit.input_low_rank is not None:
        flops += 4 * k * edit.input_low_rank.rank + k
    if edit.output_low_rank is not None:
        low = edit.output_low_rank
        flops += 2 * int(low.a.size) + 2 * d * low.rank + d
    return flops * len(site.uses)


def _side_op_numbers(edit: Edit) -> int:
    return sum(array.size for name, array in edit.tensors().items() if not name.endswith("s"))


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


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
