"""What a placement adds: operations, memory traffic and bytes.  Counted, not measured; ``bench`` measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deployfa.edits import Edit, LowRank
from deployfa.graph.sites import Site

__all__ = ["Cost", "cheaper_form", "own_weight_cost", "side_op_cost"]


@dataclass(frozen=True)
class Cost:
    """flops and traffic are per token (per position for a convolution) and all uses of the site together.

    ``traffic_bytes``: activations that the added nodes read and write.  ``stored_bytes``: what the graph grows by.
    ``patch_bytes``: tensors that change or are added, which is what an update has to ship.
    """

    flops: int = 0
    traffic_bytes: int = 0
    stored_bytes: int = 0
    patch_bytes: int = 0
    note: str = ""


def own_weight_cost(site: Site, edit: Edit) -> Cost:
    """A fold costs nothing at run time; a shared weight costs its own copy, a new bias one addition per output."""
    itemsize, d = _itemsize(site), site.out_features
    weight = site.weight.stored_bytes if edit.changes_weight else 0
    flops = traffic = stored = 0
    patch, note = weight, ""
    if site.weight.embeds and weight:
        note += f"; untied from the embedding, at {weight:,} bytes"
        stored += weight
    elif site.weight.readers - set(site.nodes) and not site.weight.quantised and weight:
        note += "; its own copy, the initializer is shared"
        stored += weight
    if site.weight.quantised and weight:
        note += "; into its scales, the integers stay"
    if edit.output_scale is not None and edit.delta is None and any(use.bias_value is not None for use in site.uses):
        patch += itemsize * d
    if edit.delta is not None:
        shift = itemsize * d * math.prod(site.experts)
        patch += shift
        if any(use.bias_value is None for use in site.uses):
            note += "; adds a bias for δ"
            stored += shift
            # Gemm and Conv take a bias for free; after a MatMul it is an Add of its own
            if any(use.bias_node is None for use in site.uses):
                flops, traffic = d, 2 * d * itemsize
    return Cost(flops, traffic, stored, patch, note)


def side_op_cost(site: Site, edit: Edit, form: Literal["input", "output"] = "input") -> Cost:
    """The nodes that a side op adds: Mul and Add over k, two products and an Add for low rank."""
    k, d, itemsize = site.in_features, site.out_features, _itemsize(site)
    flops = moved = 0
    for vector in (edit.lam, edit.delta):
        if vector is not None:
            flops, moved = flops + k, moved + 2 * k
    numbers = sum(array.size for name, array in edit.tensors().items() if not name.endswith("s"))
    if edit.input_low_rank is not None:
        width = k if form == "input" else d
        low_flops, low_moved = _low_rank(edit.input_low_rank, k, width)
        flops, moved = flops + low_flops, moved + low_moved
        numbers += edit.input_low_rank.rank * (width - k)
    if edit.output_low_rank is not None:
        low_flops, low_moved = _low_rank(edit.output_low_rank, k, d)
        flops, moved = flops + low_flops, moved + low_moved
    if edit.output_scale is not None:
        flops, moved = flops + d, moved + 2 * d
    uses, stored = len(site.uses), numbers * itemsize
    return Cost(flops * uses, moved * itemsize * uses, stored, stored)


def cheaper_form(site: Site, edit: Edit) -> Literal["input", "output"]:
    """Where a LoRFA's product costs less: added to the k inputs, or, as ``B' = W B``, to the d outputs.

    By FLOPs, then by bytes moved.  The output form needs the one matrix W, and an input that is not quantised.
    """
    if edit.input_low_rank is None or site.convolves or site.experts or not site.weight.is_constant:
        return "input"
    if any(use.integer or use.dynamic is not None for use in site.uses):
        return "input"
    before, after = side_op_cost(site, edit, "input"), side_op_cost(site, edit, "output")
    cheaper = (after.flops, after.traffic_bytes, after.stored_bytes) < (
        before.flops,
        before.traffic_bytes,
        before.stored_bytes,
    )
    return "output" if cheaper else "input"


def _low_rank(low: LowRank, k: int, width: int) -> tuple[int, int]:
    """(FLOPs, numbers moved): A reads k and writes r, B reads r and writes the width, the Add reads two, writes one."""
    flops = 2 * int(low.a.size) + 2 * width * low.rank + width
    return flops, k + 2 * low.rank + width + 3 * width


def _itemsize(site: Site) -> int:
    dtype = site.weight.dtype
    return int(dtype.itemsize) if dtype is not None and dtype.is_floating_point() else 4
