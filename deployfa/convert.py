"""Turn one adapter into another form or another method, where that is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from deployfa.adapter import Adapter
from deployfa.adapter.peft_convolutions import CONVOLUTIONS
from deployfa.base_graphs import base_graph
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import EditError, InputError, SiteError
from deployfa.graph.sites import find_sites

__all__ = ["to_ia3", "to_lora", "to_vefa", "with_strength"]


def with_strength(adapter: Adapter, strength: float) -> Adapter:
    """The adapter with every part of every edit scaled by t: λ, s, δ, LoRA's s', and IA3's λ' of the output.

    ``strength`` t is finite; 0 leaves the base (with the adapter's replaced modules, which have no in-between), 1 the
    adapter, more exaggerates it.  Exactly: ``T_t(x) = x + t (T(x) - x)``, LoRA's addition times t, and an output factor
    of ``1 + t λ'``.  A site's output is linear in t unless λ' stands beside other parts, whose product it then scales.
    """
    if not np.isfinite(strength):
        raise InputError(f"strength {strength} is not a number; pass one such as 0.5")
    if strength == 1.0:
        return adapter
    edits = {site: _scaled(edit, strength) for site, edit in adapter.edits.items()}
    training = {**adapter.training, "strength": strength * float(adapter.training.get("strength", 1.0))}
    return dataclasses.replace(adapter, edits=edits, training=training)


def to_lora(
    adapter: Adapter, *, model: str | Path | None = None, status: Callable[[str], None] | None = None
) -> Adapter:
    """LoRFA → LoRA, exactly: ``A' = A``, ``B' = W B``, the same s, because ``W (s B A x) = s (W B) (A x)``.

    W comes from the base graph.  ``B'`` is computed in float64 and stored in float32.  Raises ``InputError`` for an
    adapter whose edits have no exact LoRA form: a VeFA scales features, and ``W diag(λ)`` has full rank.
    """
    for site, edit in adapter.edits.items():
        if edit.lam is not None:
            raise InputError(
                f"site '{site}' scales its features, and W diag(λ) has full rank: no LoRA of small rank equals it; "
                "export the adapter itself"
            )
        if edit.delta is not None:
            raise InputError(f"site '{site}' has a shift δ, which LoRA cannot hold; train without --shift")
        if edit.output_scale is not None:
            raise InputError(
                f"site '{site}' scales its output, and diag(λ) W has full rank: no LoRA of small rank equals it; "
                "export the adapter itself"
            )
    base = base_graph(adapter, model=model, status=status)
    weights = _weights(base.load(), adapter.edits)
    edits = {site: _lora(site, edit, weights[site]) for site, edit in adapter.edits.items()}
    ranks = {edit.output_low_rank.rank for edit in edits.values() if edit.output_low_rank is not None}
    scales = {edit.output_low_rank.s for edit in edits.values() if edit.output_low_rank is not None}
    if len(ranks) != 1 or len(scales) != 1:
        raise InputError("sites differ in rank or scale; convert adapters of one rank")
    rank, scale = ranks.pop(), scales.pop()
    config = {**_config(adapter, "LORA"), "r": rank, "lora_alpha": scale * rank}
    return dataclasses.replace(adapter, method="lora", edits=edits, config=config, found="converted from LoRFA")


def to_ia3(adapter: Adapter) -> Adapter:
    """VeFA → IA3 of the feed-forward kind at every site: ``l = 1 + λ``, the same T.  An IA3 is returned as it is.

    The arrays stay the same objects; saved as a PEFT directory, λ survives bit for bit (see
    ``deployfa.adapter.peft_ia3``).  Raises ``InputError`` for an edit that is more than a factor on the input.
    """
    if adapter.method == "ia3":
        return adapter
    if not adapter.edits:
        raise InputError("the adapter edits no layer, so there is nothing to write as IA3; pass a VeFA")
    for site, edit in adapter.edits.items():
        if edit.delta is not None:
            raise InputError(f"site '{site}' has a shift δ, which IA3 cannot hold; train without --shift")
        if edit.lam is None or set(edit.tensors()) != {"lambda"}:
            raise InputError(
                f"site '{site}' is no factor on the input alone, and IA3 only scales; export the adapter itself"
            )
    config = {**_config(adapter, "IA3"), "feedforward_modules": sorted(adapter.edits)}
    return dataclasses.replace(adapter, method="ia3", config=config, found="converted from VeFA")


def to_vefa(adapter: Adapter) -> Adapter:
    """IA3 of the feed-forward kind → VeFA: ``λ = l - 1``, the same T.  A VeFA is returned as it is.

    Raises ``InputError`` for an edit that is more than a factor on the input: IA3 outside ``feedforward_modules``
    scales what a layer gives, bias included, and a VeFA only what it reads.
    """
    if adapter.method == "vefa":
        return adapter
    if not adapter.edits:
        raise InputError("the adapter edits no layer, so there is nothing to write as VeFA; pass an IA3")
    for site, edit in adapter.edits.items():
        if edit.output_scale is not None:
            raise InputError(
                f"site '{site}' scales its output, bias included, and VeFA scales the input: none equals it; "
                "export the IA3 itself"
            )
        if edit.lam is None or set(edit.tensors()) != {"lambda"}:
            raise InputError(
                f"site '{site}' is no factor on the input, so no VeFA equals it; export the adapter itself"
            )
    return dataclasses.replace(adapter, method="vefa", config=_config(adapter, "VEFA"), found="converted from IA3")


def _config(adapter: Adapter, peft_type: str) -> dict[str, Any]:
    """What PEFT must know of the converted adapter, whatever made the one before."""
    kept = {CONVOLUTIONS: adapter.config[CONVOLUTIONS]} if CONVOLUTIONS in adapter.config else {}
    return {
        "peft_type": peft_type,
        "target_modules": sorted(adapter.edits),
        "modules_to_save": sorted(adapter.modules) or None,
        "task_type": adapter.config.get("task_type"),
        "base_model_name_or_path": adapter.config.get("base_model_name_or_path") or adapter.base.name,
        **kept,
    }


def _scaled(edit: Edit, t: float) -> Edit:
    def vector(array: Array | None) -> Array | None:
        # float64 keeps t * λ to one rounding; storage rounds once more, when the fold is cast
        return None if array is None else array.astype(np.float64) * t

    def low(part: LowRank | None) -> LowRank | None:
        return None if part is None else dataclasses.replace(part, s=part.s * t)

    return Edit(
        lam=vector(edit.lam),
        input_low_rank=low(edit.input_low_rank),
        delta=vector(edit.delta),
        output_low_rank=low(edit.output_low_rank),
        output_scale=vector(edit.output_scale),
    )


def _weights(model: ir.Model, edits: Mapping[str, Edit]) -> dict[str, Array]:
    sites = find_sites(model)
    missing = sorted(set(edits) - set(sites))
    if missing:
        raise SiteError.unknown(missing, sites)
    found: dict[str, Array] = {}
    for path in edits:
        weight = sites[path].constant_weight()
        if weight is None or weight.ndim != 2:
            raise EditError(f"site '{path}' has no constant (d, k) weight to multiply with; only dense layers convert")
        found[path] = weight
    return found


def _lora(site: str, edit: Edit, weight: Array) -> Edit:
    low = edit.input_low_rank
    if low is None:
        return edit
    if edit.output_low_rank is not None:
        raise EditError(f"site '{site}' has low rank on both sides; convert each alone")
    b = (weight.astype(np.float64) @ low.b.astype(np.float64)).astype(np.float32)
    return Edit(output_low_rank=LowRank(low.a, b, low.s))
