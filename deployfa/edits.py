"""What an adapter does to one site, and the algebra that folds it into a weight.  numpy only.

A site computes ``y = W x + c`` with ``W: (d, k)``.  An edit changes the site's input, and for LoRA and IA3 its output::

    T(x) = (1 + λ) ⊙ x + s · B (A x) + δ                      VeFA: λ.  LoRFA: A, B, s.  δ optional with either.
    y    = (1 + λ') ⊙ (W T(x) + c + s' · B' (A' x))           LoRA: A', B', s'.  IA3: λ' (or λ), bias included.

Sources: arXiv 2510.19155 (VeFA; LoRFA in its first version), arXiv 2106.09685 (LoRA), arXiv 2205.05638 (IA3).

Folding is done in float64 and cast once, by the caller, to the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deployfa.errors import EditError

__all__ = ["Array", "Edit", "Float64", "LowRank", "apply_input", "fold_conv", "fold_matrix"]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
#: How many axes each tensor of an edit has; LoRA's A has more for a convolution.
_NDIM = {
    "lambda": (1,),
    "delta": (1,),
    "A": (2,),
    "B": (2,),
    "s": (0,),
    "out_A": (2, 3, 4, 5),
    "out_B": (2,),
    "out_s": (0,),
    "out_lambda": (1,),
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """``s · B (A x)``.  A: (r, k), or (r, k, *kernel) for a LoRA of a convolution; B: (out, r); s: a number."""

    a: Array
    b: Array
    s: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def delta(self) -> Float64:
        """``s B A``.  Returns (out, k), or (out, k, *kernel) when A has a kernel; float64."""
        a = self.a.astype(np.float64)
        product = self.b.astype(np.float64) @ a.reshape(a.shape[0], -1)
        return np.asarray(self.s * product.reshape(product.shape[0], *a.shape[1:]))


@dataclass(frozen=True, eq=False)
class Edit:
    """The edit of one site.  λ and δ: (k,); ``input_low_rank`` is LoRFA's, ``output_low_rank`` is LoRA's.

    ``output_scale`` is λ': (d,), which scales the whole output of the layer, the bias and LoRA's part too.
    """

    lam: Array | None = None
    input_low_rank: LowRank | None = None
    delta: Array | None = None
    output_low_rank: LowRank | None = None
    output_scale: Array | None = None

    def tensors(self) -> dict[str, Array]:
        """Name → array, the form in which adapter files store an edit; the inverse of ``from_tensors``."""
        found: dict[str, Array] = {}
        if self.lam is not None:
            found["lambda"] = self.lam
        if self.delta is not None:
            found["delta"] = self.delta
        for prefix, low in (("", self.input_low_rank), ("out_", self.output_low_rank)):
            if low is not None:
                found |= {f"{prefix}A": low.a, f"{prefix}B": low.b, f"{prefix}s": np.asarray(low.s, dtype=np.float64)}
        if self.output_scale is not None:
            found["out_lambda"] = self.output_scale
        return found

    @classmethod
    def from_tensors(cls, site: str, tensors: Mapping[str, Array]) -> Edit:
        """Build the edit of ``site``; raises ``EditError`` on a missing, unknown or misshapen tensor."""
        left = dict(tensors)
        lows: list[LowRank | None] = []
        for prefix in ("", "out_"):
            names = [f"{prefix}A", f"{prefix}B", f"{prefix}s"]
            present = [name for name in names if name in left]
            if present and len(present) < 3:
                missing = ", ".join(sorted(set(names) - set(present)))
                raise EditError(f"site '{site}': low rank without {missing}; the adapter file is incomplete")
            parts = [left.pop(name) for name in present]
            if parts and parts[2].size != 1:
                raise EditError(f"site '{site}': {prefix}s has shape {parts[2].shape}; expected one number")
            lows.append(LowRank(parts[0], parts[1], float(parts[2].reshape(()))) if parts else None)
        edit = cls(left.pop("lambda", None), lows[0], left.pop("delta", None), lows[1], left.pop("out_lambda", None))
        if left:
            raise EditError(f"site '{site}': unknown tensor '{min(left)}'; written by a newer deployfa?")
        for name, array in edit.tensors().items():
            ranks = _NDIM[name]
            if array.ndim not in ranks:
                raise EditError(f"site '{site}': {name} has shape {array.shape}; the adapter file is damaged")
        return edit

    @property
    def changes_weight(self) -> bool:
        """Whether a fold changes the weight: everything but δ does."""
        parts = (self.lam, self.input_low_rank, self.output_low_rank, self.output_scale)
        return any(part is not None for part in parts)

    @property
    def parameters(self) -> int:
        """How many trained numbers the edit holds (s is not trained)."""
        return sum(a.size for name, a in self.tensors().items() if not name.endswith("s"))

    @property
    def in_features(self) -> int | None:
        """k, as the tensors tell it; ``None`` for an empty edit and for an output scale alone."""
        if self.lam is not None:
            return int(self.lam.shape[0])
        if self.delta is not None:
            return int(self.delta.shape[0])
        low = self.input_low_rank or self.output_low_rank
        return int(low.a.shape[1]) if low is not None else None

    def distance(self) -> float:
        """How far the edit is from the identity: the root mean square over the k inputs of what T adds per unit of
        input, ``sqrt((‖diag(λ) + s B A‖² + ‖δ‖²) / k)``; for LoRA ``‖s' B' A'‖ / sqrt(k)``; for an output scale the
        root mean square of λ' over the d outputs.  Their squares add up.  0 for an untrained edit.
        """
        outputs = 0.0 if self.output_scale is None else float(np.mean(self.output_scale.astype(np.float64) ** 2))
        k = self.in_features
        if k is None:
            return float(np.sqrt(outputs))
        square = 0.0
        if self.input_low_rank is not None:
            matrix = self.input_low_rank.delta()
            if self.lam is not None:
                matrix = matrix + np.diag(self.lam.astype(np.float64))
            square += float(np.sum(matrix**2))
        elif self.lam is not None:
            square += float(np.sum(self.lam.astype(np.float64) ** 2))
        if self.delta is not None:
            square += float(np.sum(self.delta.astype(np.float64) ** 2))
        if self.output_low_rank is not None:
            square += float(np.sum(self.output_low_rank.delta() ** 2))
        return float(np.sqrt(square / k + outputs))

    def check(self, site: str, in_features: int, out_features: int, kernel: tuple[int, ...] = ()) -> None:
        """Raise ``EditError`` unless every tensor is finite, floating point, and fits a (d, k) site.

        ``kernel`` is a convolution's; LoRA's A must have the same, or none where the kernel is a single point.
        """
        k, d = in_features, out_features
        expected: dict[str, tuple[int | None, ...]] = {
            "lambda": (k,),
            "delta": (k,),
            "A": (None, k),
            "B": (k, None),
            "out_B": (d, None),
            "out_lambda": (d,),
        }
        for name, array in self.tensors().items():
            if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
                raise EditError(f"site '{site}': {name} has dtype {array.dtype}; expected floating point")
            if not np.isfinite(array.astype(np.float64)).all():
                raise EditError(f"site '{site}': {name} holds NaN or infinity; the adapter's training diverged")
            want = expected.get(name)
            if want is not None and not _fits(array.shape, want):
                raise EditError(
                    f"site '{site}': {name} has shape {array.shape}, but the layer has in_features {k} and "
                    f"out_features {d}; the adapter belongs to another base model"
                )
        for low in (self.input_low_rank, self.output_low_rank):
            if low is not None and (low.b.ndim != 2 or low.a.ndim < 2 or low.b.shape[1] != low.a.shape[0]):
                raise EditError(f"site '{site}': A {low.a.shape} and B {low.b.shape} have different ranks")
        if self.output_low_rank is not None:
            shape = self.output_low_rank.a.shape
            if shape[1] != k:
                raise EditError(f"site '{site}': LoRA's A has shape {shape}, but the layer has in_features {k}")
            if shape[2:] != kernel and (shape[2:] or set(kernel) != {1}):
                raise EditError(f"site '{site}': LoRA's A has shape {shape}, but the layer's kernel is {kernel}")


def _fits(shape: tuple[int, ...], want: tuple[int | None, ...]) -> bool:
    return len(shape) == len(want) and all(w is None or s == w for s, w in zip(shape, want, strict=True))


def apply_input(edit: Edit, x: Array, *, axis: int = -1) -> Float64:
    """``T(x) = (1 + λ) ⊙ x + s B (A x) + δ`` along ``axis``, which has length k.  The folds' reference, float64."""
    moved = np.moveaxis(x.astype(np.float64), axis, -1)
    result = moved.copy()
    if edit.lam is not None:
        result *= 1.0 + edit.lam.astype(np.float64)
    if edit.input_low_rank is not None:
        result += moved @ edit.input_low_rank.delta().T
    if edit.delta is not None:
        result += edit.delta.astype(np.float64)
    return np.moveaxis(result, -1, axis)


def fold_matrix(edit: Edit, weight: Array, bias: Array | None) -> tuple[Float64, Float64 | None]:
    """Fold ``edit`` into a dense layer.

    ``W' = diag(1+λ') (W (diag(1+λ) + s B A) + s' B' A')`` and ``c' = (1+λ') ⊙ (c + W δ)``; without δ and λ' the bias
    is unchanged.

    weight: (d, k); bias: (d,) or None.  Returns new float64 arrays; the bias is None only if it was and δ is absent.
    A caller that keeps the bias elsewhere (``bias=None`` here) scales it by ``1 + λ'`` itself.
    """
    w = weight.astype(np.float64)
    folded = w.copy()
    if edit.lam is not None:
        folded *= 1.0 + edit.lam.astype(np.float64)
    if edit.input_low_rank is not None:
        # (W B) A takes r (d + k) products a row where W (B A) takes k²
        low = edit.input_low_rank
        folded += low.s * ((w @ low.b.astype(np.float64)) @ low.a.astype(np.float64))
    if edit.output_low_rank is not None:
        folded += edit.output_low_rank.delta()
    passed = None if edit.delta is None else w @ edit.delta.astype(np.float64)
    return _outputs(edit, folded, passed, bias)


def fold_conv(edit: Edit, weight: Array, bias: Array | None, *, groups: int = 1) -> tuple[Float64, Float64 | None]:
    """Fold ``edit`` into a convolution of any rank.

    ``W'[o, i] = W[o, i] (1 + λ[g(o) · k/groups + i])`` for every kernel position, g(o) the group of output o; low rank
    mixes the input channels, ``W'[o, j] += Σ_i W[o, i] (s B A)[i, j]``, which only ``groups == 1`` allows; δ passes
    through the summed kernel, which is exact only without zero padding (the planner checks).  λ' scales what comes
    out, the bias too: ``c'[o] = (1 + λ'[o]) (c[o] + …)``.

    weight: (d, k/groups, *kernel); bias: (d,) or None.  Returns new float64 arrays, as ``fold_matrix`` does.
    """
    w = weight.astype(np.float64)
    per_group, d = w.shape[1], w.shape[0]
    kernel_axes = tuple(range(2, w.ndim))
    low = edit.input_low_rank
    if groups != 1 and (low is not None or edit.output_low_rank is not None):
        raise EditError("low rank does not fold into a grouped convolution: it mixes channels across groups")

    def per_output(vector: Array) -> Float64:
        """(k,) → (d, k/groups): the channels that each output sees."""
        rows = vector.astype(np.float64).reshape(groups, per_group)
        return np.repeat(rows, d // groups, axis=0)

    folded = w.copy()
    if edit.lam is not None:
        folded *= np.expand_dims(1.0 + per_output(edit.lam), kernel_axes)
    if low is not None:
        folded += np.moveaxis(np.tensordot(w, low.delta(), axes=(1, 0)), -1, 1)
    if edit.output_low_rank is not None:
        delta = edit.output_low_rank.delta()
        folded += delta.reshape(w.shape) if delta.ndim == w.ndim else np.expand_dims(delta, kernel_axes)
    passed = None
    if edit.delta is not None:
        passed = np.sum(w.sum(axis=kernel_axes) * per_output(edit.delta), axis=1)
    return _outputs(edit, folded, passed, bias)


def _outputs(edit: Edit, folded: Float64, passed: Float64 | None, bias: Array | None) -> tuple[Float64, Float64 | None]:
    """``(1+λ') ⊙ folded`` over its rows and ``(1+λ') ⊙ (bias + passed)``; changes ``folded``.  passed: (d,), W δ."""
    total = None if bias is None else bias.astype(np.float64)
    if passed is not None:
        total = passed if total is None else total + passed
    if edit.output_scale is not None:
        scale = 1.0 + edit.output_scale.astype(np.float64)
        folded *= scale.reshape(-1, *([1] * (folded.ndim - 1)))
        total = None if total is None else total * scale
    return folded, total
