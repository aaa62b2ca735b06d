"""Layers of every operator with weights and biases in every form, drawn at random."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from .ball import Ball
from .strategies import numbers
from .twin import Operand

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SIZES = st.sampled_from([2, 3, 4, 6])


def source(draw, layers, rng, shape, *, plain=False):
    """(what is stored, the operand of ``shape`` made of it)."""
    twin, steps = layers.twin, []
    array = numbers(rng, *shape)
    if not plain:
        for _ in range(draw(st.integers(0, 3))):
            # from the operand back to what is stored
            kind = draw(st.sampled_from(["Transpose", "Reshape", "Identity", "Cast"]))
            if kind == "Cast" and any(step[0] == "Cast" for step in steps):
                continue
            if kind == "Transpose" and array.ndim > 1:
                perm = draw(st.permutations(range(array.ndim)))
                steps.insert(0, (kind, perm))
                array = array.transpose(np.argsort(perm))
            elif kind == "Reshape":
                steps.insert(0, (kind, array.shape))
                array = array.reshape(draw(_other_shapes(array.shape)))
            else:
                steps.insert(0, ("Cast" if kind == "Cast" else "Identity", None))
    dtype, fed = None, not plain and draw(st.integers(0, 9)) == 0
    if any(kind == "Cast" for kind, _ in steps):
        dtype = draw(st.sampled_from([np.float16, np.float32]))
    node = not plain and not fed and draw(st.booleans())
    stored = twin.store(array, dtype, node=node, fed=fed)
    operand = stored
    for kind, how in steps:
        operand = layers.view(operand, kind, how)
    return stored, operand


def _other_shapes(shape):
    whole = math.prod(shape)
    merged = [(whole,), (1, *shape), (*shape, 1), (1, whole)]
    if len(shape) > 1:
        merged += [(shape[0] * shape[1], *shape[2:]), (shape[1], shape[0], *shape[2:])]
    if shape and shape[0] % 2 == 0:
        merged.append((2, shape[0] // 2, *shape[1:]))
    return st.sampled_from(merged)


def bias_of(draw, layers, rng, d, before):
    """A bias in one of the shapes that broadcast over (*before, d), or none."""
    kind = draw(st.sampled_from(["vector", "none", "vector", "row", "scalar", "one", "table", "column"]))
    if kind == "none":
        return None
    shapes = {"vector": (d,), "row": (1,) * len(before) + (d,), "scalar": (), "one": (1,)}
    shape = (shapes | {"table": (before[-1], d), "column": (before[-1], 1)})[kind]
    if kind == "scalar" or draw(st.booleans()):
        return layers.twin.store(numbers(rng, *shape), node=kind != "scalar" and draw(st.booleans()))
    return source(draw, layers, rng, shape)[1]


def dense(draw, layers, rng, x, k, d, site, *, weight=None, bias="draw", how=None, plain=False):
    """A MatMul or Gemm on ``x``, (…, k): (its output, its weight, its bias, how it computes).

    ``weight``: (what is stored, the operand) of an earlier layer; ``how``: as an earlier layer did.
    """
    twin = layers.twin
    rank = len(twin.shape(x))
    ops = [("matmul", {})]
    if rank == 2:
        scale = {"alpha": draw(st.sampled_from([1.0, 0.5, -1.5])), "beta": draw(st.sampled_from([1.0, -2.0, 0.0]))}
        ops += [("gemm kd", {"trans_b": False} | scale), ("gemm dk", {"trans_b": True} | scale)]
    if weight is not None:
        # a square operand may be read either way
        ops = [op for op in ops if weight[1].array.shape == ((d, k) if op[0] == "gemm dk" else (k, d))]
    op, attributes = how or draw(st.sampled_from(ops))
    if weight is None:
        weight = source(draw, layers, rng, (d, k) if op == "gemm dk" else (k, d), plain=plain)
    c = bias_of(draw, layers, rng, d, twin.shape(x)[:-1]) if isinstance(bias, str) else bias
    if op == "matmul":
        y = layers.matmul(x, weight[1], site, c, bias_first=draw(st.booleans()))
    else:
        y = layers.gemm(x, weight[1], site, c, **attributes)
    return y, weight, c, (op, attributes)


def experts(draw, layers, rng, site):
    """A batch of matrices, one for each expert: (experts, tokens, k) times (experts, k, d)."""
    k, d, count = draw(SIZES), draw(SIZES), draw(st.integers(1, 3))
    x = layers.twin.feed(numbers(rng, count, 2, k))
    stored, operand = source(draw, layers, rng, (count, k, d))
    shapes = [None, (d,), (count, 1, d), (1, 1, d), ()]
    shape = draw(st.sampled_from(shapes))
    c = None if shape is None else layers.twin.store(numbers(rng, *shape))
    return layers.matmul(x, operand, site, c, bias_first=draw(st.booleans())), (stored, operand), c


def convolution(draw, layers, rng, site, *, x=None):
    """Conv or ConvTranspose of one to three dimensions."""
    twin, rank = layers.twin, draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if group == 1:
        per_in, per_out = draw(SIZES), draw(SIZES)
    k, d = group * per_in, group * per_out
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    strides = [draw(st.integers(1, 2)) for _ in range(rank)]
    transposed = draw(st.integers(0, 3)) == 0
    dilations = [1 if transposed else draw(st.integers(1, 2)) for _ in range(rank)]
    pads = [draw(st.integers(0, 1)) for _ in range(2 * rank)] if draw(st.booleans()) else [0] * (2 * rank)
    if transposed:
        # no more is cut off than the kernel adds
        pads = [min(pad, m // 2) for pad, m in zip(pads, 2 * kernel, strict=True)]
    space = [5, 5, 5][:rank] if not transposed else [3, 2, 2][:rank]
    x = twin.feed(numbers(rng, 2, k, *space))
    weight = source(draw, layers, rng, (k, per_out, *kernel) if transposed else (d, per_in, *kernel))
    c = source(draw, layers, rng, (d,))[1] if draw(st.booleans()) else None
    if transposed:
        return layers.conv_transpose(x, weight[1], site, c, strides=strides, pads=pads, group=group), weight, c
    y = layers.conv(x, weight[1], site, c, strides=strides, pads=pads, dilations=dilations, group=group)
    return y, weight, c


def looked_up(draw, twin, rng, stored):
    """An embedding that reads the rows of a stored matrix."""
    rows = rng.integers(0, stored.array.shape[0], 3)
    made = twin.typed("Gather", stored.value, twin.integers(rows), axis=0, dtype=stored.value.dtype.numpy())
    return twin.means(made, lambda _: Ball.exact(stored.array[rows]))


def answered(twin, operand: Operand):
    """Stored numbers, or a view of them, as an output of the graph."""
    made = twin.typed("Identity", operand.value, dtype=operand.value.dtype.numpy())
    return twin.means(made, lambda _: Ball.exact(operand.array))
