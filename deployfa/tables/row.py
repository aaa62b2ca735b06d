"""An adapter as one row of a layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from deployfa.adapter import Adapter
from deployfa.edits import Array, Edit, Float64, fold_matrix
from deployfa.errors import BaseMismatchError, EditError, SiteError
from deployfa.tables.layout import Head, Layout, LowRanks, Vectors
from deployfa.tables.words import TABLE, Words

__all__ = ["base_row", "check_fingerprint", "row_of"]

#: LoRFA's and LoRA's, which a layout has one place for.
_LOW_RANK = {"A", "B", "s", "out_A", "out_B", "out_s"}


def base_row(layout: Layout, heads: Mapping[str, tuple[Array, Array | None]]) -> dict[str, Array]:
    """The row that leaves the base as it is: zeros, and its own heads.

    heads: site → (weight (d, k), bias (d,) or None), as PyTorch has them; d may be less than the layout's room.
    """
    row = {name: np.zeros(shape, np.float32) for name, shape in layout.shapes().items()}
    for head in layout.heads:
        weight, bias = heads[head.site]
        _check_head(head, weight, bias)
        _write_head(row, head, weight.astype(np.float64), None if bias is None else bias.astype(np.float64))
    return row


def row_of(
    adapter: Adapter,
    layout: Layout,
    base: Mapping[str, Array],
    *,
    weights: Mapping[str, Callable[[], Array]] | None = None,
    allow_mismatch: bool = False,
    words: Words = TABLE,
) -> dict[str, Array]:
    """``adapter`` as one row: tensor → array, float32, computed in float64 and rounded once.

    base: the base's row, whose heads stay where the adapter brings none.  An edit of a head is folded into it.
    weights: site → W (d, k), which a LoRFA needs where the layout adds low ranks to the output.  words: what a refusal
    says that the row is for.  Raises
    ``BaseMismatchError`` on another base, ``SiteError`` for a site or part that the layout has no place for, and
    ``EditError`` on values that are not finite or do not fit, a rank or a number of labels beyond the room included.
    """
    check_fingerprint(adapter, layout, allow_mismatch=allow_mismatch, words=words)
    heads = {head.site: head for head in layout.heads}
    edits = {site: edit for site, edit in adapter.edits.items() if site not in heads}
    _check_places(edits, layout, words)
    row = {name: np.zeros(shape, np.float32) for name, shape in layout.shapes().items()}
    for vectors in layout.vectors:
        _write_vectors(row, vectors, edits)
    for low in layout.low_ranks:
        _write_low_ranks(row, low, edits, weights or {}, words)
    given = _modules_by_site(adapter, heads)
    for site, head in heads.items():
        weight, bias = given.get(site) or _head_of(base, head)
        # before the fold, which takes shapes that fit for granted
        _check_head(head, weight, bias, words)
        if site in adapter.edits:
            edit = adapter.edits[site]
            edit.check(site, head.in_features, weight.shape[0])
            weight, bias = fold_matrix(edit, weight, bias)
        _write_head(row, head, weight, bias)
    return row


def check_fingerprint(adapter: Adapter, layout: Layout, *, allow_mismatch: bool = False, words: Words = TABLE) -> None:
    """Raise ``BaseMismatchError`` unless ``adapter`` was trained on a base that the layout was made for."""
    if allow_mismatch:
        return
    found = adapter.base.fingerprint
    if found is None:
        raise BaseMismatchError(
            "the adapter names no base fingerprint, so its base cannot be checked; pass --allow-base-mismatch if you "
            "know that it is the right one"
        )
    if found not in layout.fingerprints:
        short = found.removeprefix("sha256:")[:12]
        known = ", ".join(each.removeprefix("sha256:")[:12] for each in layout.fingerprints)
        raise BaseMismatchError(
            f"the adapter was trained on base {short} ({adapter.base.name}), {words.name} is for base {known}; "
            f"{words.other_base}"
        )


def _check_places(edits: Mapping[str, Edit], layout: Layout, words: Words) -> None:
    places = layout.sites()
    missing = sorted(set(edits) - set(places))
    if missing:
        raise SiteError.unknown(missing, places)
    for site, edit in edits.items():
        for name in sorted(edit.tensors()):
            part = "A" if name in _LOW_RANK else name
            if part not in places[site]:
                has = ", ".join(sorted(places[site]))
                raise SiteError(f"site '{site}' has no place for '{name}' here, only for: {has}; {words.other_place}")


def _write_vectors(row: dict[str, Array], vectors: Vectors, edits: Mapping[str, Edit]) -> None:
    for segment in vectors.segments:
        edit = edits.get(segment.site)
        value = edit.tensors().get(vectors.part) if edit is not None else None
        if value is None:
            continue
        if value.shape != (segment.stop - segment.start,):
            raise EditError(
                f"site '{segment.site}': {vectors.part} has shape {value.shape}, the layer has "
                f"{segment.stop - segment.start} features; the adapter belongs to another base model"
            )
        row[vectors.name][segment.start : segment.stop] = _single(value.astype(np.float64), segment.site, vectors.part)


def _write_low_ranks(
    row: dict[str, Array],
    low: LowRanks,
    edits: Mapping[str, Edit],
    weights: Mapping[str, Callable[[], Array]],
    words: Words,
) -> None:
    for number, (site, width) in enumerate(zip(low.sites, low.widths, strict=True)):
        edit = edits.get(site)
        parts = [] if edit is None else _as_placed(site, edit, low, weights, words)
        if not parts:
            continue
        for a, b in parts:
            if a.shape[1:] != (low.in_features,) or b.shape != (width, a.shape[0]):
                raise EditError(
                    f"site '{site}': A {a.shape} and B {b.shape} do not fit {low.in_features} → {width} features; the "
                    "adapter belongs to another base model"
                )
        rank = sum(len(a) for a, _ in parts)
        if rank > low.rank:
            raise EditError(
                f"site '{site}': the adapter has rank {rank}, {words.name} has room for {low.rank}; "
                f"{words.larger} --max-rank {rank}"
            )
        start = number * low.rank
        row[low.a_name][:, start : start + rank] = _single(np.concatenate([a for a, _ in parts]).T, site, "A")
        row[low.b_name(site)][:rank] = _single(np.concatenate([b for _, b in parts], axis=1).T, site, "B")


def _as_placed(
    site: str, edit: Edit, low: LowRanks, weights: Mapping[str, Callable[[], Array]], words: Words
) -> list[tuple[Float64, Float64]]:
    """(A, s B) of every low rank of ``edit``, float64, as it is added where the layout adds it.

    A LoRFA beside the output is the LoRA ``A' = A``, ``B' = W B``; a LoRA has no form on the input.
    """
    parts: list[tuple[Float64, Float64]] = []
    for part, where in ((edit.input_low_rank, "input"), (edit.output_low_rank, "output")):
        if part is None:
            continue
        a, b = part.a.astype(np.float64), part.s * part.b.astype(np.float64)
        # a kernel of one point is none
        a = a.reshape(a.shape[:2]) if a.size == math.prod(a.shape[:2]) else a
        if where == "output" and low.where == "input":
            raise SiteError(f"site '{site}' has no place for a LoRA here, only for a LoRFA; {words.other_place}")
        if where == "input" and low.where == "output":
            if site not in weights:
                raise EditError(
                    f"site '{site}' takes a LoRFA as the LoRA that equals it, which needs the base's weights; make it "
                    "with: deployfa convert ADAPTER --to lora"
                )
            w = weights[site]().astype(np.float64)
            if w.shape[1:] != b.shape[:1]:
                raise EditError(
                    f"site '{site}': B {b.shape} does not fit a layer of {w.shape[1]} inputs; the adapter belongs to "
                    "another base model"
                )
            b = w @ b
        parts.append((a, b))
    return parts


def _modules_by_site(adapter: Adapter, heads: Mapping[str, Head]) -> dict[str, tuple[Array, Array | None]]:
    """The layers of the replaced modules: site → (weight, bias), float64; a module may hold several layers."""
    found: dict[str, dict[str, Array]] = {}
    for module, parameters in adapter.modules.items():
        for name, array in parameters.items():
            inner, _, parameter = f"{module}.{name}".rpartition(".")
            if inner not in heads or parameter not in {"weight", "bias"}:
                raise SiteError(
                    f"module '{module}': '{name}' has no place here; heads with a place: "
                    f"{', '.join(sorted(heads)) or 'none'}"
                )
            found.setdefault(inner, {})[parameter] = array.astype(np.float64)
    layers: dict[str, tuple[Array, Array | None]] = {}
    for site, parts in found.items():
        if "weight" not in parts:
            raise EditError(f"module '{site}' brings a bias and no weight; the adapter file is incomplete")
        layers[site] = parts["weight"], parts.get("bias")
    return layers


def _head_of(base: Mapping[str, Array], head: Head) -> tuple[Array, Array | None]:
    """The base's own, without what is masked."""
    bias = base[head.bias_name].astype(np.float64)
    kept = ~np.isneginf(bias)
    return base[head.weight_name].astype(np.float64).T[kept], bias[kept]


def _check_head(head: Head, weight: Array, bias: Array | None, words: Words = TABLE) -> None:
    """Raise ``EditError`` unless weight is (d, k) and bias (d,), with 1 ≤ d ≤ the room."""
    if weight.ndim != 2 or weight.shape[1] != head.in_features or not weight.shape[0]:
        raise EditError(
            f"module '{head.site}': weight has shape {weight.shape}, the layer has {head.in_features} inputs; the "
            "adapter belongs to another base model"
        )
    labels = weight.shape[0]
    if bias is not None and bias.shape != (labels,):
        raise EditError(
            f"module '{head.site}': weight has shape {weight.shape} and bias {bias.shape}; the adapter file is damaged"
        )
    if labels > head.out_features:
        raise EditError(
            f"module '{head.site}': the adapter has {labels} labels, {words.name} has room for {head.out_features}; "
            f"{words.larger} --max-labels {labels}"
        )


def _write_head(row: dict[str, Array], head: Head, weight: Array, bias: Array | None) -> None:
    """(d, k) and (d,) → (k, room) and (room,); what is not there answers minus infinity, so that no softmax sees it."""
    labels = weight.shape[0]
    row[head.weight_name][:, :labels] = _single(weight.T, head.site, "weight")
    row[head.bias_name][:] = -np.inf
    row[head.bias_name][:labels] = 0.0 if bias is None else _single(bias, head.site, "bias")


def _single(values: Array, owner: str, name: str) -> Array:
    """float64 → float32 in one rounding; raises ``EditError`` on what is not finite, or is not any more."""
    with np.errstate(over="ignore"):
        single: Array = values.astype(np.float32)
    if not np.isfinite(single).all():
        raise EditError(f"site '{owner}': {name} holds NaN, infinity or a value beyond float32; nothing was written")
    return single
