"""int8 by Q/DQ nodes: ONNX Runtime's own static quantisation, with the settings that TensorRT takes.

Symmetric weights (a scale for each output) and symmetric activations (one scale for a tensor, by its largest value).
Only products with a stored weight are quantised: not attention's two, nor a low rank beside its layer, nor the last
layer, which costs little and whose error nothing averages out.

One scale serves a tensor badly whose largest value is far above the rest, as after GELU.  Rounding to q = max/127 adds
noise of q/√12, so relative to the tensor::

    noise = max|x| / (127 √12 rms(x))

In the order of that noise, as many products are quantised as the answers bear, found by halving.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.errors import InputError, MissingExtraError
from deployfa.graph.storage import load_graph, save_graph
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner

__all__ = ["quantise"]

_PRODUCTS = {"MatMul", "Gemm", "Conv"}
#: A smaller inner or outer size is an adapter's low rank, or a depthwise kernel's.
_SMALLEST = 32


def quantise(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Array]],
    error: Callable[[ir.Model], float],
    *,
    allowed: float,
) -> tuple[ir.Model, list[str]]:
    """``model`` with as many weights in int8 as ``error`` of the result lets be, at most ``allowed``, and the names of
    their nodes.

    feeds: what the scales of activations are measured on, one call each.  ``model``, whose nodes have names, is not
    changed.  Raises ``MissingExtraError`` without onnxruntime and ``InputError`` where there is nothing to quantise, to
    measure on, or to gain.
    """
    if find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "cpu", "int8")
    if not feeds:
        raise InputError("int8 is calibrated with the bundle's stored reference, which is empty; export it again")
    noise = _noises(model, _candidates(model), feeds)
    order = sorted(noise, key=lambda name: noise[name])
    best: ir.Model | None = None
    fine, untried = 0, len(order)
    while fine < untried:
        # all of them first: often they are borne
        tried = untried if untried == len(order) else (fine + untried + 1) // 2
        candidate = _quantised(model, order[:tried], feeds)
        if error(candidate) <= allowed:
            best, fine = candidate, tried
        else:
            untried = tried - 1
    if best is None:
        raise InputError(
            f"no product can be in int8 without losing more than {allowed:.1e} of the answers; use --precision fp16"
        )
    return best, order[:fine]


def _quantised(model: ir.Model, chosen: Sequence[str], feeds: Sequence[Mapping[str, Array]]) -> ir.Model:
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory(prefix="deployfa-int8-") as scratch:
        folder = Path(scratch)
        (folder / "in").mkdir()
        (folder / "out").mkdir()
        source = save_graph(model, folder / "in")
        result = folder / "out" / "model.onnx"
        with _quiet():
            quantization.quantize_static(
                source,
                result,
                _reader(quantization, model, feeds),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=sorted(_PRODUCTS),
                nodes_to_quantize=list(chosen),
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
                use_external_data_format=True,
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
        quantised = load_graph(result)
        # the folder goes, and the graph's weights lie in it
        for value in quantised.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    return quantised


def _candidates(model: ir.Model) -> list[str]:
    stored = set(model.graph.initializers)
    answers = {id(value) for value in model.graph.outputs}
    chosen = []
    for node in model.graph:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type not in _PRODUCTS or weight is None or weight.name not in stored:
            continue
        size = min(weight.shape.numpy()[:2]) if weight.shape is not None and len(weight.shape) >= 2 else 0
        last = any(id(output) in answers or _only_moved(output, answers) for output in node.outputs)
        if size >= _SMALLEST and not last and node.name:
            chosen.append(node.name)
    return chosen


def _noises(model: ir.Model, names: Sequence[str], feeds: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Product → the noise that quantising its input would add, relative to the input."""
    probe = model.clone()
    read: dict[str, str] = {}
    shown = {value.name for value in probe.graph.outputs}
    for node in probe.graph:
        source = node.inputs[0] if node.name in names else None
        if source is None or source.name is None:
            continue
        read[str(node.name)] = source.name
        if source.name not in shown and not source.is_graph_input():
            shown.add(source.name)
            probe.graph.outputs.append(source)
    largest, squares, counts = (dict.fromkeys(read.values(), 0.0) for _ in range(3))
    with tempfile.TemporaryDirectory(prefix="deployfa-int8-") as folder:
        runner = OnnxRuntimeRunner(save_graph(probe, Path(folder)), spinning=False)
        for feed in feeds:
            fed = {spec.name: feed[spec.name] for spec in runner.inputs}
            seen = {**fed, **runner.run(fed)}
            for tensor in set(read.values()):
                array = seen[tensor].astype(np.float64)
                largest[tensor] = max(largest[tensor], float(np.abs(array).max()))
                squares[tensor] += float(np.square(array).sum())
                counts[tensor] += array.size
    rounding = 127 * np.sqrt(12)
    return {
        name: float(largest[tensor] / (rounding * np.sqrt(squares[tensor] / counts[tensor])))
        for name, tensor in read.items()
    }


def _only_moved(value: ir.Value, answers: set[int]) -> bool:
    """Whether ``value`` becomes an answer by a bias alone."""
    return any(
        use.node.op_type == "Add" and any(id(output) in answers for output in use.node.outputs) for use in value.uses()
    )


def _reader(quantization: Any, model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> Any:
    names = [str(value.name) for value in model.graph.inputs]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter([{name: feed[name] for name in names} for feed in feeds])

        def get_next(self) -> dict[str, Array] | None:
            return next(self._left, None)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It advises to pre-process, which would fuse the graph for ONNX Runtime."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
