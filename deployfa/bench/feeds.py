"""Synthetic feeds: the same arrays for every contender that takes an input of the same name."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from deployfa.bench.contender import Shape
from deployfa.edits import Array
from deployfa.errors import RuntimeTargetError
from deployfa.graph.row_ops import ADAPTER_IDS
from deployfa.preprocess.prompt import KEPT
from deployfa.runtimes.runner import TensorSpec

__all__ = ["make_feeds"]


def make_feeds(
    inputs: Sequence[TensorSpec], shape: Shape, *, seed: int = 0, vocabulary: int = 1000, adapters: int = 0
) -> dict[str, Array]:
    """Arrays for every input at ``shape``.

    A decoder with a cache is fed one new token after ``shape.sequence`` that it has read: a step of generation.
    Otherwise a dynamic first dimension is the batch and any other one the sequence, unless its name says ``batch`` or
    ``seq``.
    Token ids are drawn from [1, vocabulary), masks are ones, position ids count up, floating-point inputs are standard
    normal, everything else is zero.  ``adapters``: of a pack; the rows of a batch go to as many different ones as there
    are, drawn at random.  Raises ``RuntimeTargetError`` on a dtype that it cannot make.
    """
    feeds = {spec.name: _make(spec, shape, seed, vocabulary) for spec in _at_a_step(inputs, shape)}
    if KEPT in feeds:
        feeds["position_ids"] = np.full_like(feeds["input_ids"], shape.sequence)
    if adapters and ADAPTER_IDS in feeds:
        order = 1 + np.random.default_rng(seed).permutation(adapters)
        feeds[ADAPTER_IDS] = np.resize(order, shape.batch).astype(np.int64)
    return feeds


def _at_a_step(inputs: Sequence[TensorSpec], shape: Shape) -> list[TensorSpec]:
    """Of a decoder, the sizes of one step in the place of their names."""
    if all(spec.name != KEPT for spec in inputs):
        return list(inputs)
    sizes = {"sequence": 1, "kept": 1, "past_sequence": shape.sequence, "total_sequence": shape.sequence + 1}
    return [
        dataclasses.replace(spec, shape=tuple(sizes.get(str(size), size) for size in spec.shape)) for spec in inputs
    ]


def _make(spec: TensorSpec, shape: Shape, seed: int, vocabulary: int) -> Array:
    sizes = tuple(_size(axis, size, shape) for axis, size in enumerate(spec.shape))
    # seeded by name: the order of a graph's inputs does not change what they hold
    generator = np.random.default_rng((seed, zlib.crc32(spec.name.encode())))
    dtype = _dtype(spec)
    if dtype.kind == "f" or spec.dtype == "bfloat16":
        return np.asarray(generator.standard_normal(sizes)).astype(dtype)
    if "mask" in spec.name:
        return np.ones(sizes, dtype)
    if "position" in spec.name and sizes:
        return np.broadcast_to(np.arange(sizes[-1]), sizes).astype(dtype)
    if dtype.kind in "iu" and spec.name.endswith("input_ids"):
        return generator.integers(1, vocabulary, sizes).astype(dtype)
    return np.zeros(sizes, dtype)


def _size(axis: int, size: int | str, shape: Shape) -> int:
    if isinstance(size, int):
        return size
    if "batch" in size:
        return shape.batch
    if "seq" in size:
        return shape.sequence
    return shape.batch if axis == 0 else shape.sequence


def _dtype(spec: TensorSpec) -> np.dtype[np.generic]:
    if spec.dtype == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError as error:
        raise RuntimeTargetError(f"input '{spec.name}' is {spec.dtype}; no feed of that type can be made up") from error
    return dtype
