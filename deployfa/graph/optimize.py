"""Fuse a graph for ONNX Runtime, the last step: after it, sites can no longer be found.

Two libraries do the work, each the better one at some shapes (neither always beats no fusion at all), so ``auto``
builds every candidate and the pipeline times them.  ``ort-sum`` is the first one's graph with residuals that ONNX
Runtime cannot fuse with their norm, see ``residual_sums``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import onnx_ir as ir

from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError
from deployfa.graph.fused_products import part_products
from deployfa.graph.residual_sums import residual_sums

__all__ = ["FUSIONS", "fuse"]


def fuse(model: ir.Model, name: str) -> ir.Model:
    """A fused copy of ``model``; ``name`` is a key of ``FUSIONS``.

    Raises ``InputError`` for an unknown name and ``MissingExtraError`` if the fusing library is not installed.
    """
    if name not in FUSIONS:
        raise InputError(f"no fusion '{name}'; use auto or one of: {', '.join(FUSIONS)}")
    with _quiet():
        return FUSIONS[name](model.clone())


def _none(model: ir.Model) -> ir.Model:
    return model


def _transformers(model: ir.Model) -> ir.Model:
    """``transformers.exporters``' fusions for the CPU provider: attention, skip-norm, bias-GELU, packed QKV."""
    try:
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
    except ImportError as error:
        if find_spec("transformers") is not None:
            raise RuntimeTargetError(
                "the fusion 'ort' needs transformers 5.23 or newer; use --optimize auto"
            ) from error
        raise MissingExtraError("transformers", "train", "the fusion 'ort'") from error
    fuse_for_onnxruntime(model, "cpu")
    part_products(model)
    return model


def _transformers_sums(model: ir.Model) -> ir.Model:
    """``ort`` without fused skip-norms."""
    fused = _transformers(model)
    residual_sums(fused)
    return fused


def _onnxscript(model: ir.Model) -> ir.Model:
    """onnxscript's own ONNX Runtime fusions."""
    try:
        from onnxscript.rewriter.ort_fusions import optimize_for_ort
    except ImportError as error:
        raise MissingExtraError("onnxscript", "train", "the fusion 'onnxscript'") from error
    fused, _counts = optimize_for_ort(model)
    part_products(fused)
    return fused


FUSIONS: dict[str, Callable[[ir.Model], ir.Model]] = {
    "none": _none,
    "ort": _transformers,
    "ort-sum": _transformers_sums,
    "onnxscript": _onnxscript,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
