"""What a placement adds: operations, memory traffic and bytes.  Counted, not measured; ``bench`` measures."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deployfa.edits import Edit, LowRank
from deployfa.graph.norm import Norm
from deployfa.graph.sites import Site

__all__ = ["Cost", "norm_cost", "own_weight_cost", "side_op_cost"]


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
    weight = itemsize * math.prod(site.shape)
    flops = traffic = stored = 0
    patch, note = weight, ""
    ours = {use.node for use in site.uses}
    if any(node not in ours for node in site.weight.consumers()):
        note += "; its own copy, the initializer is shared"
        stored += weight
    if edit.delta is not None:
        patch += itemsize * d
        if any(use.bias is None for use in site.uses):
            note += "; adds a bias for δ"
            stored += itemsize * d
            # Gemm and Conv take a bias for free; after a MatMul it is an Add of its own
            if site.uses[0].node.op_type == "MatMul":
                flops, traffic = d, 2 * d * itemsize
    return Cost(flops, traffic, stored, patch, note)


def norm_cost(norm: Norm, *, first: bool) -> Cost:
    """Nothing but the vectors themselves, counted at the first site of the norm."""
    return Cost(patch_bytes=norm.bytes if first else 0)


def side_op_cost(site: Site, edit: Edit) -> Cost:
    """The nodes that a side op adds: Mul and Add over k, two products and an Add for low rank."""
    k, d, itemsize = site.in_features, site.out_features, _itemsize(site)
    flops = moved = 0
    for vector in (edit.lam, edit.delta):
        if vector is not None:
            flops, moved = flops + k, moved + 2 * k
    for low, width in ((edit.input_low_rank, k), (edit.output_low_rank, d)):
        if low is not None:
            flops += _low_rank_flops(low, width)
            # A reads k and writes r, B reads r and writes the width, the Add reads two and writes one
            moved += k + 2 * low.rank + width + 3 * width
    numbers = sum(array.size for name, array in edit.tensors().items() if not name.endswith("s"))
    uses, stored = len(site.uses), numbers * itemsize
    return Cost(flops * uses, moved * itemsize * uses, stored, stored)


def _low_rank_flops(low: LowRank, width: int) -> int:
    return 2 * int(low.a.size) + 2 * width * low.rank + width


def _itemsize(site: Site) -> int:
    dtype = site.weight.dtype
    return int(dtype.itemsize) if dtype is not None and dtype.is_floating_point() else 4
