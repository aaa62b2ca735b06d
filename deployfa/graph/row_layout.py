"""Decide what a row must hold so that every one of some adapters fits it, and say what cannot ride in one batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.edits import Array, Edit
from deployfa.errors import InputError, PlanError, SiteError
from deployfa.graph.resize import answers
from deployfa.graph.sites import Site, find_sites
from deployfa.tables import Head, Layout, LowRanks, Segment, Vectors
from deployfa.tables.layout import VectorPart

__all__ = ["answer_width", "base_heads", "base_weights", "make_layout"]

_PARTS: tuple[VectorPart, ...] = ("lambda", "delta", "out_lambda")


def make_layout(
    model: ir.Model,
    adapters: Mapping[str, Adapter],
    *,
    max_rank: int = 0,
    max_labels: int = 0,
    mixed: bool = True,
) -> Layout:
    """The smallest layout that every adapter fits, in the order in which the graph runs the sites.

    ``max_rank`` and ``max_labels`` leave room for adapters that are added later; mixed: whether one batch runs several,
    which slots do not.  Raises ``SiteError`` for a site or module that the graph lacks, ``EditError`` for an edit that
    does not fit its site, and ``PlanError``, with the reason, for one that cannot differ from row to row.
    """
    if not adapters:
        raise InputError("no adapters to pack; name at least one")
    sites = find_sites(model)
    heads: dict[str, int] = {}
    for name, adapter in adapters.items():
        for path, labels in _heads_of(adapter, sites, name).items():
            room = max_labels if answers(sites[path]) else 0
            heads[path] = max(heads.get(path, sites[path].out_features), labels, room)
    ranks: dict[str, int] = {}
    after: set[str] = set()
    parts: set[tuple[str, str]] = set()
    for name, adapter in adapters.items():
        missing = sorted(set(adapter.edits) - set(sites))
        if missing:
            raise SiteError(f"adapter '{name}': {SiteError.unknown(missing, sites)}")
        for path, edit in adapter.edits.items():
            edit.check(path, sites[path].in_features, sites[path].out_features, sites[path].kernel)
            if path in heads:
                continue
            _check(sites[path], edit, mixed=mixed)
            parts |= {(path, part) for part in _PARTS if part in edit.tensors()}
            lows = [low for low in (edit.input_low_rank, edit.output_low_rank) if low is not None]
            if lows:
                ranks[path] = max(ranks.get(path, max_rank), sum(low.rank for low in lows))
            if edit.output_low_rank is not None or _better_after(sites[path]):
                after.add(path)
    return Layout(
        fingerprints=sorted({adapter.base.fingerprint for adapter in adapters.values() if adapter.base.fingerprint}),
        vectors=[vectors for part in _PARTS if (vectors := _vectors(part, parts, sites)).segments],
        low_ranks=_low_ranks(sites, ranks, after),
        heads=[
            Head(site=path, in_features=site.in_features, out_features=heads[path])
            for path, site in sites.items()
            if path in heads
        ],
    )


def answer_width(model: ir.Model, layout: Layout) -> int:
    """How many labels a row answers, masked ones included."""
    sites = find_sites(model)
    shape = model.graph.outputs[0].shape
    own = shape[-1] if shape is not None and len(shape) else None
    heads = [head.out_features for head in layout.heads if answers(sites[head.site])]
    return max([*heads, own if isinstance(own, int) else 0])


def base_heads(model: ir.Model, layout: Layout) -> dict[str, tuple[Array, Array | None]]:
    """The base's own weight (d, k) and bias (d,) of every head: what row 0 answers with."""
    sites = find_sites(model)
    found: dict[str, tuple[Array, Array | None]] = {}
    for head in layout.heads:
        site = sites[head.site]
        weight, bias = site.constant_weight(), site.uses[0].bias
        assert weight is not None  # _heads_of refuses any other
        found[head.site] = weight, None if bias is None else bias.numbers().reshape(-1)
    return found


def base_weights(model: ir.Model, layout: Layout) -> dict[str, Callable[[], Array]]:
    """W (d, k), Gemm's alpha in it, of every site whose low rank is added to the output: what makes a LoRA of a LoRFA.

    Read when called.
    """
    sites = find_sites(model)
    paths = [path for low in layout.low_ranks if low.where == "output" for path in low.sites]
    return {path: partial(_weight, sites[path]) for path in paths if sites[path].weight.is_constant}


def _weight(site: Site) -> Array:
    weight = site.constant_weight()
    assert weight is not None  # base_weights asks for stored ones only
    single: Array = site.uses[0].alpha * weight.astype(np.float64).reshape(weight.shape[:2])
    return single


def _vectors(part: VectorPart, wanted: set[tuple[str, str]], sites: Mapping[str, Site]) -> Vectors:
    segments: list[Segment] = []
    at = 0
    for path, site in sites.items():
        if (path, part) in wanted:
            size = site.out_features if part == "out_lambda" else site.in_features
            segments.append(Segment(site=path, start=at, stop=at + size))
            at += size
    return Vectors(part=part, segments=segments)


def _low_ranks(sites: Mapping[str, Site], ranks: Mapping[str, int], after: Collection[str]) -> list[LowRanks]:
    """Sites that read the same tensors share one A, so that x is read once for all of them."""
    groups: dict[tuple[int | bool, ...], list[str]] = {}
    for path, site in sites.items():
        if path in ranks:
            groups.setdefault((path in after, *(id(use.input) for use in site.uses)), []).append(path)
    return [
        LowRanks(
            where="output" if members[0] in after else "input",
            sites=members,
            in_features=sites[members[0]].in_features,
            rank=max(ranks[member] for member in members),
            widths=[sites[m].out_features if m in after else sites[m].in_features for m in members],
        )
        for members in groups.values()
    ]


def _better_after(site: Site) -> bool:
    """Whether a LoRFA costs less as the LoRA that it equals, ``s (W B) (A x)``: d products instead of k; of equals this
    one, because queries, keys and values that still read one tensor are one product."""
    return not site.convolves and site.weight.is_constant and site.out_features <= site.in_features


def _heads_of(adapter: Adapter, sites: Mapping[str, Site], name: str) -> dict[str, int]:
    """The layers of the replaced modules → how many outputs each has in this adapter."""
    found: dict[str, int] = {}
    for module, parameters in adapter.modules.items():
        for full, array in ((f"{module}.{each}", array) for each, array in parameters.items()):
            path, _, parameter = full.rpartition(".")
            site = sites.get(path)
            if site is None or site.convolves or site.experts or parameter not in {"weight", "bias"}:
                raise PlanError(
                    f"adapter '{name}' replaces '{full}', which is no parameter of a dense layer; only those can "
                    "differ from row to row: export it as a bundle of its own"
                )
            if not site.weight.is_constant or len(site.uses) != 1:
                raise PlanError(f"adapter '{name}' replaces '{path}', which the graph computes or runs twice")
            if array.shape[:1] != (site.out_features,) and not answers(site):
                raise PlanError(
                    f"adapter '{name}': '{path}' has {array.shape[0]} outputs, the base's has {site.out_features}, and "
                    "other layers read them; only the last layer of a head may differ in size"
                )
            found[path] = int(array.shape[0])
    return found


def _check(site: Site, edit: Edit, *, mixed: bool) -> None:
    """What a row of a batch cannot have for itself."""
    path = site.path
    if site.experts:
        raise PlanError(f"site '{path}' holds many experts, whose rows are not the batch's; export a bundle for each")
    if any(use.integer or use.dynamic is not None for use in site.uses):
        raise PlanError(f"site '{path}' is quantised; pack adapters of a floating-point base")
    if site.weight.dtype != ir.DataType.FLOAT:
        raise PlanError(f"site '{path}' is {site.weight.dtype}; tables are float32 on a float32 base")
    for use in site.uses if mixed else ():
        shape = use.input.shape
        if shape is None or not len(shape) or isinstance(shape[0], int):
            raise PlanError(
                f"site '{path}' reads what is the same for every row of a batch ({use.input.name}, such as positions), "
                "so its rows cannot differ; export a bundle for it"
            )
    if edit.delta is not None and any(use.pads_first for use in site.uses):
        raise PlanError(f"site '{path}': its module pads with zeros, which δ must not reach; train without δ")
    if edit.output_low_rank is not None and site.convolves and not _pointwise(site):
        raise PlanError(
            f"site '{path}': LoRA of a convolution with a kernel cannot differ from row to row; export a bundle for it"
        )


def _pointwise(site: Site) -> bool:
    node = site.uses[0].node
    strides, pads = node.attributes.get_ints("strides", []), node.attributes.get_ints("pads", [])
    plain = set(strides) <= {1} and not any(pads)
    return site.layout == "conv" and set(site.kernel) == {1} and plain and site.groups == 1
