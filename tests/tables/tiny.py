"""A layout with every part that there is, adapters of every method for it, and its base."""

from __future__ import annotations

from typing import Any

import numpy as np

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank
from deployfa.tables import Head, Layout, LowRanks, Segment, Vectors

FINGERPRINT = "sha256:" + "0123456789ab" * 4
HEAD = "classifier"
#: site → (in_features, out_features); q and k read one input; no layer is square, so that a mixed-up axis cannot hide
SITES = {"q": (5, 7), "k": (5, 6), "up": (8, 3)}
BASE_LABELS = ("no", "yes")
ROOM = 4


def make_layout(**changes: Any) -> Layout:
    """Every part: λ and δ of two sites, λ' of one, a LoRFA of two sites that read one input, a LoRA of one, a head."""
    parts: dict[str, Any] = {
        "fingerprints": [FINGERPRINT, "sha256:another"],
        "vectors": [
            Vectors(part="lambda", segments=[Segment(site="q", start=0, stop=5), Segment(site="up", start=5, stop=13)]),
            Vectors(part="delta", segments=[Segment(site="up", start=0, stop=8), Segment(site="k", start=8, stop=13)]),
            Vectors(part="out_lambda", segments=[Segment(site="k", start=0, stop=6)]),
        ],
        "low_ranks": [
            LowRanks(where="input", sites=["q", "k"], in_features=5, rank=3, widths=[5, 5]),
            LowRanks(where="output", sites=["up"], in_features=8, rank=2, widths=[3]),
        ],
        "heads": [Head(site=HEAD, in_features=3, out_features=ROOM)],
    }
    return Layout(**(parts | changes))


def draw(rng: np.random.Generator, *shape: int) -> Array:
    """float32 numbers away from zero: none of them is the identity."""
    sign = np.where(rng.random(shape) < 0.5, -1, 1)
    return (sign * rng.uniform(0.25, 2.0, shape)).astype(np.float32)


def make_adapter(method: str, seed: int = 0, **changes: Any) -> Adapter:
    """An adapter of ``method`` for ``make_layout``; ``changes`` are fields of ``Adapter``."""
    rng = np.random.default_rng(seed)

    def low(rank: int, k: int, out: int) -> LowRank:
        return LowRank(draw(rng, rank, k), draw(rng, out, rank), 0.75)

    edits = {
        "vefa": lambda: {"q": Edit(lam=draw(rng, 5)), "up": Edit(lam=draw(rng, 8))},
        "shift": lambda: {"up": Edit(delta=draw(rng, 8)), "k": Edit(delta=draw(rng, 5))},
        "ia3": lambda: {"q": Edit(lam=draw(rng, 5)), "k": Edit(output_scale=draw(rng, 6))},
        "lorfa": lambda: {"q": Edit(input_low_rank=low(3, 5, 5)), "k": Edit(input_low_rank=low(2, 5, 5))},
        "lora": lambda: {"up": Edit(output_low_rank=low(1, 8, 3))},
        "mixture": lambda: {
            "k": Edit(input_low_rank=low(1, 5, 5), delta=draw(rng, 5), output_scale=draw(rng, 6)),
            "up": Edit(lam=draw(rng, 8), delta=draw(rng, 8), output_low_rank=low(2, 8, 3)),
        },
        "head": lambda: {},
    }[method]()
    base = BaseReference(name="tiny", fingerprint=FINGERPRINT)
    fields: dict[str, Any] = {"method": method, "edits": edits, "base": base}
    if method == "head":
        labels = 1 + seed % ROOM
        fields["modules"] = {HEAD: {"weight": draw(rng, labels, 3), "bias": draw(rng, labels)}}
        fields["labels"] = tuple(f"label {number}" for number in range(labels))
    return Adapter(**(fields | changes))


METHODS = ("vefa", "shift", "ia3", "lorfa", "lora", "mixture", "head")


def base_head(seed: int = 99) -> tuple[Array, Array]:
    """weight (2, 3) and bias (2,) of the base's own head."""
    rng = np.random.default_rng(seed)
    return draw(rng, 2, 3), draw(rng, 2)
