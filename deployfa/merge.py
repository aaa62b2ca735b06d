"""One adapter from several: the linear combination of what each of them adds, exactly.

At a site, adapter i adds ``D_i x + δ_i`` to the input, with ``D_i = diag(λ_i) + s_i B_i A_i``, and a LoRA adds
``s'_i B'_i A'_i x`` to the output.  The merged edit adds ``Σ w_i (…)`` of each::

    λ = Σ w_i λ_i      δ = Σ w_i δ_i      A = [A_1; A_2; …]      B = [w_1 s_1 B_1, w_2 s_2 B_2, …]      s = 1

An output scale multiplies whatever else the site does, so it combines only with output scales: ``λ' = Σ w_i λ'_i``.
A site that an adapter does not edit gets nothing from it.  Computed in float64; A keeps its dtype where all agree.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from deployfa.adapter import Adapter, BaseReference
from deployfa.adapter.peft_convolutions import CONVOLUTIONS
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import BaseMismatchError, EditError, InputError

__all__ = ["Merged", "merge_adapters", "merge_edits"]


@dataclass(frozen=True, eq=False)
class Merged:
    """The merged adapter, and what the caller should be told of it."""

    adapter: Adapter
    warnings: tuple[str, ...]


def merge_adapters(
    adapters: Mapping[str, Adapter],
    *,
    weights: Sequence[float] | None = None,
    head: str | None = None,
    allow_base_mismatch: bool = False,
) -> Merged:
    """``Σ w_i`` of the edits of ``adapters`` (name → adapter), with the head of one of them.

    weights: one for each adapter, finite; 1/N each if ``None``.  head: whose replaced modules and labels to keep, by
    name or by number from 1; needed only where they differ.  No argument is changed.

    Raises ``InputError`` for weights or a head that fit no adapter, ``BaseMismatchError`` for adapters of different
    bases unless ``allow_base_mismatch``, ``EditError`` for edits of one site that do not add up.
    """
    if len(adapters) < 2:
        raise InputError("merging takes two adapters or more; to scale one, use deployfa convert with --strength")
    factors = _weights(weights, len(adapters))
    owner = _head(adapters, head)
    warnings = _check_bases(adapters, allow_base_mismatch) + [
        f"'{name}' was trained for labels {', '.join(a.labels)}; the head that is kept has {', '.join(owner.labels)}"
        for name, a in adapters.items()
        if a.labels and a.labels != owner.labels
    ]
    sites = dict.fromkeys(site for adapter in adapters.values() for site in adapter.edits)
    edits = {
        site: merge_edits(
            site, [(w, a.edits[site]) for w, a in zip(factors, adapters.values(), strict=True) if site in a.edits]
        )
        for site in sites
    }
    methods = dict.fromkeys(part for a in adapters.values() if a.edits for part in a.method.split("+"))
    method = "+".join(methods) or owner.method
    merged = Adapter(
        method=method,
        edits=edits,
        modules=owner.modules,
        base=_base(owner, list(adapters.values())),
        labels=owner.labels,
        config=_config(method, edits, owner, adapters.values()),
        training={
            "merged": [
                {"name": PurePath(name).name, "weight": w, "method": a.method, "training": dict(a.training)}
                for w, (name, a) in zip(factors, adapters.items(), strict=True)
            ]
        },
        found=f"merged from {len(adapters)} adapters",
    )
    return Merged(merged, tuple(warnings))


def merge_edits(site: str, parts: Sequence[tuple[float, Edit]]) -> Edit:
    """``Σ w_i`` of what the edits of one ``site`` add; raises ``EditError`` if they do not add up."""
    parts = [(weight, edit) for weight, edit in parts if edit.tensors()]
    mixed = any(set(edit.tensors()) != {"out_lambda"} for _, edit in parts)
    if mixed and any(edit.output_scale is not None for _, edit in parts):
        if len(parts) == 1 and parts[0][0] == 1.0:
            return parts[0][1]
        raise EditError(
            f"site '{site}': an adapter scales the output and something else changes the site too, and a product is no "
            "sum; merge adapters that all scale the output alone there"
        )
    return Edit(
        lam=_sum(site, "λ", [(w, edit.lam) for w, edit in parts]),
        input_low_rank=_stacked(site, [(w, edit.input_low_rank) for w, edit in parts]),
        delta=_sum(site, "δ", [(w, edit.delta) for w, edit in parts]),
        output_low_rank=_stacked(site, [(w, edit.output_low_rank) for w, edit in parts]),
        output_scale=_sum(site, "λ of the output", [(w, edit.output_scale) for w, edit in parts]),
    )


def _sum(site: str, name: str, terms: Sequence[tuple[float, Array | None]]) -> Array | None:
    found = [(weight, vector.astype(np.float64)) for weight, vector in terms if vector is not None]
    if not found:
        return None
    _same_shape(site, name, [vector.shape for _, vector in found])
    total: Array = np.sum([weight * vector for weight, vector in found], axis=0)
    return total


def _stacked(site: str, terms: Sequence[tuple[float, LowRank | None]]) -> LowRank | None:
    """``Σ w_i s_i B_i A_i`` as one low rank with s = 1, of the sum of the ranks."""
    found = [(weight, low) for weight, low in terms if low is not None]
    if not found:
        return None
    axes = max(low.a.ndim for _, low in found)
    # LoRA without a kernel fits a pointwise convolution: the same A with axes of length 1
    downs = [low.a.reshape(*low.a.shape, *([1] * (axes - low.a.ndim))) for _, low in found]
    _same_shape(site, "A", [a.shape[1:] for a in downs])
    _same_shape(site, "B", [low.b.shape[:1] for _, low in found])
    if len({a.dtype for a in downs}) > 1:
        downs = [a.astype(np.float64) for a in downs]
    ups = [weight * low.s * low.b.astype(np.float64) for weight, low in found]
    return LowRank(np.concatenate(downs, axis=0), np.concatenate(ups, axis=1), 1.0)


def _same_shape(site: str, name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise EditError(
            f"site '{site}': {name} is {shapes[0]} in one adapter and {other} in another; merge adapters of one base"
        )


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise InputError(f"{len(weights)} weights for {count} adapters; pass --weights with one number for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weights {', '.join(map(str, weights))} are not all finite; pass numbers such as 0.5,0.5")
    return [float(weight) for weight in weights]


def _head(adapters: Mapping[str, Adapter], head: str | None) -> Adapter:
    """The adapter whose replaced modules and labels are kept: the one asked for, or any if all say the same."""
    names = list(adapters)
    choices = ", ".join(f"{number} ({name})" for number, name in enumerate(names, start=1))
    if head is not None:
        if head in adapters:
            return adapters[head]
        if head.isdecimal() and 1 <= int(head) <= len(names):
            return adapters[names[int(head) - 1]]
        raise InputError(f"no adapter '{head}' to take the head from; pass --head with one of: {choices}")
    having = [adapter for adapter in adapters.values() if adapter.modules] or list(adapters.values())
    if any(not _same_modules(having[0].modules, other.modules) for other in having[1:]):
        raise InputError(f"the adapters bring different heads, which do not add up; pass --head with one of: {choices}")
    labelled = [adapter for adapter in having if adapter.labels] or having
    if any(other.labels != labelled[0].labels for other in labelled[1:]):
        raise InputError(f"the adapters name different labels for one head; pass --head with one of: {choices}")
    return labelled[0]


def _same_modules(one: Mapping[str, Mapping[str, Array]], other: Mapping[str, Mapping[str, Array]]) -> bool:
    def named(modules: Mapping[str, Mapping[str, Array]]) -> dict[str, tuple[Any, ...]]:
        return {
            f"{path}/{name}": (array.dtype.name, array.shape, array.tobytes())
            for path, parameters in modules.items()
            for name, array in parameters.items()
        }

    return named(one) == named(other)


def _check_bases(adapters: Mapping[str, Adapter], allow_mismatch: bool) -> list[str]:
    """Warnings; raises ``BaseMismatchError`` if two adapters name different bases.

    A fingerprint leaves out the modules that the adapter replaces: two adapters of one base that replace different
    modules have different ones, and cannot be told from adapters of two bases.
    """
    known = {name: a.base.fingerprint for name, a in adapters.items() if a.base.fingerprint is not None}
    warnings = [
        f"'{name}' names no base fingerprint, so its base could not be compared"
        for name in adapters
        if name not in known
    ]
    first = next(iter(known), "")
    other = next((name for name in known if known[name] != known[first]), None)
    if other is None:
        return warnings
    text = f"'{first}' and '{other}' were trained on different bases"
    if set(adapters[first].modules) != set(adapters[other].modules):
        text = f"'{first}' and '{other}' replace different modules, so their bases cannot be compared"
    if not allow_mismatch:
        raise BaseMismatchError(f"{text}; merge adapters of one base, or pass --allow-base-mismatch to go on anyway")
    return [*warnings, f"{text}; going on because of --allow-base-mismatch"]


def _base(owner: Adapter, adapters: Sequence[Adapter]) -> BaseReference:
    """The base of whoever replaces the modules that the merged adapter replaces, if it knows its fingerprint."""
    same = [a for a in (owner, *adapters) if set(a.modules) == set(owner.modules) and a.base.fingerprint is not None]
    return same[0].base if same else owner.base


def _config(method: str, edits: Mapping[str, Edit], owner: Adapter, adapters: Any) -> dict[str, Any]:
    """What PEFT must know to load the merged adapter; a method of its own name has no PEFT form."""
    config: dict[str, Any] = {
        "peft_type": method.upper(),
        "target_modules": sorted(edits),
        "modules_to_save": sorted(owner.modules) or None,
        "task_type": owner.config.get("task_type"),
        "base_model_name_or_path": owner.config.get("base_model_name_or_path") or owner.base.name,
    }
    entries = [entry for a in adapters if isinstance(entry := a.config.get(CONVOLUTIONS), Mapping)]
    if entries:
        config[CONVOLUTIONS] = {site: value for entry in entries for site, value in entry.items()}
    lows = {site: low for site, e in edits.items() if (low := e.input_low_rank or e.output_low_rank) is not None}
    if not lows:
        return config
    alpha = "lora_alpha" if method == "lora" else "alpha"
    rank = Counter(low.rank for low in lows.values()).most_common(1)[0][0]
    config |= {"r": rank, alpha: rank}
    others = {f"^{re.escape(site)}": low.rank for site, low in lows.items() if low.rank != rank}
    if others and method == "lora":
        # alpha = r at every site: s = 1
        config |= {"rank_pattern": others, "alpha_pattern": others}
    return config
