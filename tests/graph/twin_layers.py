"""Layers for a ``Twin``: dense and convolving, with their weight and bias in every form that a graph may keep them in.

What a layer means, with its edit (DESIGN of the edits: arXiv 2510.19155, arXiv 2106.09685)::

    T(x) = (1 + λ) ⊙ x + s B (A x) + δ
    y    = α W T(x) + β c + s' B' (A' x)

W is (d, k) as PyTorch has it, (…, d, k) for many experts, (d, k/groups, *kernel) or, transposed, (k, d/groups, *kernel)
for a convolution; which axis of an operand is which comes from the ONNX pages of MatMul, Gemm, Conv and ConvTranspose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from .ball import Ball, convolve, convolve_transposed, rounded, unit
from .twin import Operand


@dataclass(frozen=True)
class Site:
    """What an edit of the site must fit."""

    k: int
    d: int
    kernel: tuple[int, ...] = ()
    transposed: bool = False
    padded: bool = False
    experts: bool = False


def along(vector, axis, rank):
    shape = [1] * rank
    shape[axis] = -1
    return np.asarray(vector, dtype=np.float64).reshape(shape)


def changed(edit, ball, axis):
    """(T(x), the sum of absolute values in it)."""
    if edit is None:
        return ball, ball.largest
    rank = ball.center.ndim
    factor = along(1.0 + edit.lam.astype(np.float64), axis, rank) if edit.lam is not None else np.float64(1)
    center, radius, size = factor * ball.center, np.abs(factor) * ball.radius, np.abs(factor) * ball.largest
    if edit.input_low_rank is not None:
        low = edit.input_low_rank
        a, b = low.a.astype(np.float64), low.s * low.b.astype(np.float64)

        def mix(array, a, b):
            return np.moveaxis(np.moveaxis(array, axis, -1) @ a.T @ b.T, -1, axis)

        center = center + mix(ball.center, a, b)
        radius = radius + mix(ball.radius, np.abs(a), np.abs(b))
        size = size + mix(ball.largest, np.abs(a), np.abs(b))
    if edit.delta is not None:
        shift = along(edit.delta, axis, rank)
        center, size = center + shift, size + np.abs(shift)
    return Ball(center, radius), size


def layer(edit, ball, w, c, product, *, axis, dtype, alpha=1.0, lora=None):
    """``α W T(x) + c + s' B' (A' x)``; ``product(x, w)``: linear in both; ``lora(x, a)``: A' x, r on ``axis``."""
    t, size = changed(edit, ball, axis)
    center, radius = alpha * product(t.center, w), abs(alpha) * product(t.radius, np.abs(w))
    magnitude = abs(alpha) * product(size, np.abs(w))
    if c is not None:
        center, magnitude = center + c, magnitude + np.abs(c)
    if edit is not None and edit.output_low_rank is not None:
        low = edit.output_low_rank
        a, b = low.a.astype(np.float64), low.s * low.b.astype(np.float64)

        def up(array, b):
            return np.moveaxis(np.moveaxis(array, axis, -1) @ b.T, -1, axis)

        center = center + up(lora(ball.center, a), b)
        radius = radius + up(lora(ball.radius, np.abs(a)), np.abs(b))
        magnitude = magnitude + up(lora(ball.largest, np.abs(a)), np.abs(b))
    return Ball(center, radius + rounded(magnitude, dtype))


def dense_product(x, w):
    return x @ np.swapaxes(w, -1, -2)


class Layers:
    """Appends layers to ``twin`` and remembers its sites."""

    def __init__(self, twin):
        self.twin, self.sites = twin, {}

    def view(self, operand, op_type, how=None):
        """``operand`` behind one more node; ``how``: a permutation, a shape, or nothing."""
        twin, array, value = self.twin, operand.array, operand.value
        kind = value.dtype.numpy()
        if op_type == "Transpose":
            array, made = array.transpose(how), twin.typed(op_type, value, dtype=kind, perm=list(how))
        elif op_type == "Reshape":
            array, made = array.reshape(how), twin.typed(op_type, value, twin.integers(how), dtype=kind)
        elif op_type == "Cast":
            made = twin.typed("Cast", value, to=int(ir.DataType.from_numpy(twin.dtype)))
        else:
            made = twin.typed("Identity", value, dtype=kind)
        return Operand(array, made, operand.dtype)

    def matmul(self, x, weight, site=None, bias=None, *, bias_first=False, owner=None):
        """``weight``: (…, k, d); ``bias``: an operand of the Add after it, by the same module or by ``owner``."""
        twin, w = self.twin, np.swapaxes(weight.array, -1, -2)
        made = twin.typed("MatMul", x, weight.value, site=site)
        if bias is not None:
            operands = [bias.value, made] if bias_first else [made, bias.value]
            made = twin.typed("Add", *operands, site=owner or site)
        return self.dense(made, x, site, w, weight, bias)

    def gemm(self, x, weight, site=None, bias=None, *, trans_b, alpha=1.0, beta=1.0):
        """``weight``: (d, k) if ``trans_b``, else (k, d)."""
        w = weight.array if trans_b else weight.array.T
        operands = [x, weight.value] + ([bias.value] if bias is not None else [])
        made = self.twin.typed("Gemm", *operands, site=site, transB=int(trans_b), alpha=alpha, beta=beta)
        return self.dense(made, x, site, w, weight, bias, alpha=alpha, beta=beta)

    def dense(self, made, x, site, w, weight, bias, *, alpha=1.0, beta=1.0):
        """``made`` is ``α W x + β c``; w: (…, d, k)."""
        self._site(site, Site(w.shape[-1], w.shape[-2], experts=w.ndim > 2))
        c = None if bias is None else beta * bias.array
        return self._means(made, x, site, w, c, (weight, bias), dense_product, -1, alpha)

    def conv(self, x, weight, site=None, bias=None, *, strides, pads, dilations, group):
        """``weight``: (d, k/groups, *kernel)."""
        w = weight.array
        operands = [x, weight.value] + ([bias.value] if bias is not None else [])
        how = {"strides": strides, "pads": pads, "dilations": dilations}
        made = self.twin.typed("Conv", *operands, site=site, group=group, **how)
        self._site(site, Site(w.shape[1] * group, w.shape[0], w.shape[2:], padded=any(pads)))
        product, whole = partial(convolve, groups=group, **how), partial(convolve, groups=1, **how)
        c = None if bias is None else along(bias.array, 1, w.ndim)
        point = [1] * (w.ndim - 2)

        def lora(array, a):
            # a LoRA without a kernel is one of a single point, which strides too
            return whole(array, a if a.ndim > 2 else a.reshape(*a.shape, *point))

        return self._means(made, x, site, w, c, (weight, bias), product, 1, lora=lora)

    def conv_transpose(self, x, weight, site=None, bias=None, *, strides, pads, group):
        """``weight``: (k, d/groups, *kernel)."""
        w = weight.array
        operands = [x, weight.value] + ([bias.value] if bias is not None else [])
        made = self.twin.typed("ConvTranspose", *operands, site=site, group=group, strides=strides, pads=pads)
        self._site(site, Site(w.shape[0], w.shape[1] * group, w.shape[2:], transposed=True))
        product = partial(convolve_transposed, strides=strides, pads=pads, groups=group)
        c = None if bias is None else along(bias.array, 1, w.ndim)
        return self._means(made, x, site, w, c, (weight, bias), product, 1)

    def _means(self, made, x, site, w, c, operands, product, axis, alpha=1.0, lora=dense_product):
        dtype = max([self.twin.dtype, *(each.dtype for each in operands if each is not None)], key=unit)

        def function(edits, ball):
            edit = edits.get(site)
            return layer(edit, ball, w, c, product, axis=axis, dtype=dtype, alpha=alpha, lora=lora)

        return self.twin.means(made, function, x)

    def _site(self, name, site):
        if name is not None:
            self.sites[name] = site
