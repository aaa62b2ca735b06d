"""Which tensors an adapter becomes so that a graph can read it at run time, and which site reads what of them.

One adapter is one *row*: a few tensors of fixed shapes.  A slot holds one row, a table stacks N of them::

    adapter/lambda        (K,)        λ of every scaled site, one behind the other; 0 is the identity
    adapter/delta         (K',)       δ, in the same way
    adapter/out_lambda    (D,)        λ' of the outputs
    adapter/SITE/A        (k, R)      all A's of the sites that read one input, side by side, transposed
    adapter/SITE/B        (r, k)      s Bᵀ, LoRFA's; 0 is the identity
    adapter/SITE/out_A, …/out_B       the same for LoRA, B: (r, d); a LoRFA is put here too where that is cheaper
    adapter/SITE/weight   (k, d)      a whole layer (a classifier), and …/bias (d,); no identity: the base's own numbers

Vectors lie together because one Gather for all of them costs less than one a site, and a strength is one product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

__all__ = ["ACTIVE", "LABELS", "PREFIX", "STRENGTH", "Head", "Layout", "LowRanks", "Segment", "VectorPart", "Vectors"]

PREFIX = "adapter"
#: Beside a row: how much of it, and, in a graph with an idle branch, whether it runs at all; see ``deployfa.graph``.
STRENGTH = "adapter_strength"
ACTIVE = "adapter_active"
#: And what its answers mean, for readers of a file; no operator reads it.
LABELS = "adapter_labels"
VectorPart = Literal["lambda", "delta", "out_lambda"]


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers ``start:stop`` of a vector are those of ``site``."""

    site: str
    start: int
    stop: int


class Vectors(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for many sites."""

    part: VectorPart
    segments: list[Segment]

    @property
    def name(self) -> str:
        return f"{PREFIX}/{self.part}"

    @property
    def width(self) -> int:
        return self.segments[-1].stop if self.segments else 0


class LowRanks(msgspec.Struct, frozen=True, kw_only=True):
    """The low ranks of sites that read one input: one A for all, a B for each.

    ``where``: what B's product is added to, LoRFA's the layer's ``input`` or LoRA's its ``output``.  ``rank``: the room
    for each site, r; smaller ranks are padded with zeros.  ``widths``: what B makes, k or d, site by site.
    """

    where: Literal["input", "output"]
    sites: list[str]
    in_features: int
    rank: int
    widths: list[int]

    @property
    def a_name(self) -> str:
        return f"{PREFIX}/{self.sites[0]}/{'A' if self.where == 'input' else 'out_A'}"

    def b_name(self, site: str) -> str:
        return f"{PREFIX}/{site}/{'B' if self.where == 'input' else 'out_B'}"


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that each adapter may bring whole.  ``out_features`` is the room; fewer labels leave the rest masked."""

    site: str
    in_features: int
    out_features: int

    @property
    def weight_name(self) -> str:
        return f"{PREFIX}/{self.site}/weight"

    @property
    def bias_name(self) -> str:
        return f"{PREFIX}/{self.site}/bias"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a row holds; part of a bundle's manifest.

    ``fingerprints``: those of the base, see ``deployfa.adapter.fingerprint``; several, because modules that an adapter
    replaces do not count, and adapters may replace different ones.
    """

    fingerprints: list[str]
    vectors: list[Vectors]
    low_ranks: list[LowRanks]
    heads: list[Head]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor → its shape in one row; float32, all of them."""
        return dict(self._shapes())

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for vectors in self.vectors:
            yield vectors.name, (vectors.width,)
        for low in self.low_ranks:
            yield low.a_name, (low.in_features, low.rank * len(low.sites))
            for site, width in zip(low.sites, low.widths, strict=True):
                yield low.b_name(site), (low.rank, width)
        for head in self.heads:
            yield head.weight_name, (head.in_features, head.out_features)
            yield head.bias_name, (head.out_features,)

    @property
    def row_bytes(self) -> int:
        """What one adapter takes."""
        return 4 * sum(math.prod(shape) for shape in self.shapes().values())

    def sites(self) -> dict[str, set[str]]:
        """Site → the parts that a row has for it, by the names of ``Edit.tensors`` (``A`` stands for any low rank)."""
        found: dict[str, set[str]] = {}
        for vectors in self.vectors:
            for segment in vectors.segments:
                found.setdefault(segment.site, set()).add(vectors.part)
        for low in self.low_ranks:
            for site in low.sites:
                found.setdefault(site, set()).add("A")
        for head in self.heads:
            found.setdefault(head.site, set()).add("weight")
        return found
