"""How many floating-point operations one inference is, counted from the shapes that it really ran with.

A multiplication and an addition are two.  Matrix products, convolutions and attention are counted; elementwise
operators, normalisations and softmax are not: in a transformer encoder they are below 1 % and never what limits it.

Shapes come from ONNX Runtime's own profile of one run with optimisation off, so they are exact for dynamic dimensions,
custom operators, branches and loops, and they describe the graph as it is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployfa.edits import Array

__all__ = ["FlopCount", "count_graph_flops", "count_module_flops", "operator_flops"]

Size = list[int]


@dataclass(frozen=True)
class FlopCount:
    """flops: of one inference, ``None`` when something in it could not be counted; reason: what."""

    flops: int | None
    reason: str | None = None


def count_graph_flops(graph: Path, feeds: Mapping[str, Array]) -> FlopCount:
    """Run ``graph`` once on the CPU with ``feeds`` and add up its operators.  Never raises for what it cannot count."""
    try:
        events = _profile(graph, feeds)
    except Exception as error:  # whatever stops the profile only costs the figure, never the bench
        return FlopCount(None, f"the graph could not be profiled ({str(error).splitlines()[0][:200]})")
    total = 0
    for name, inputs, outputs in events:
        try:
            flops = operator_flops(name, inputs, outputs)
        except (IndexError, ZeroDivisionError):
            flops = None
        if flops is None:
            return FlopCount(None, f"no rule for a {name} of {inputs}")
        total += flops
    return FlopCount(total)


def count_module_flops(run: Callable[[], object]) -> FlopCount:
    """Count what PyTorch executes in ``run()``; attention takes its unfused form so that its products are seen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return FlopCount(int(counter.get_total_flops()))


def operator_flops(name: str, inputs: list[Size], outputs: list[Size]) -> int | None:
    """Operations of one operator, from the shapes of the tensors that it has; ``None`` when there is no rule for it.

    Sources: https://onnx.ai/onnx/operators/ and ONNX Runtime's ContribOperators.md.
    """
    rule = _RULES.get(name)
    if rule is not None:
        return rule(inputs, outputs)
    return 0 if name in _LIGHT or (name not in _HEAVY and _is_standard(name)) else None


def _matmul(inputs: list[Size], outputs: list[Size]) -> int:
    """(…, m, k) (…, k, n): 2 m k n a product."""
    return 2 * math.prod(outputs[0]) * inputs[0][-1]


def _transposable_matmul(inputs: list[Size], outputs: list[Size]) -> int | None:
    """FusedMatMul may transpose either side, so k is what is left of A's last two sizes once m is taken out."""
    a, m = inputs[0], outputs[0][-2]
    k, rest = divmod(a[-1] * a[-2], m)
    return None if rest or k not in inputs[1][-2:] else 2 * math.prod(outputs[0]) * k


def _gemm(inputs: list[Size], outputs: list[Size]) -> int:
    """A is (m, k) or (k, m), the output (m, n)."""
    return 2 * math.prod(outputs[0]) * (math.prod(inputs[0]) // outputs[0][0])


def _conv(weight: int) -> Callable[[list[Size], list[Size]], int]:
    """The weight is (d, k / groups, *kernel), input number ``weight``."""
    return lambda inputs, outputs: 2 * math.prod(outputs[0]) * math.prod(inputs[weight][1:])


def _conv_transpose(inputs: list[Size], outputs: list[Size]) -> int:
    """Every input element meets a kernel: the weight is (k, d / groups, *kernel)."""
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _attention(inputs: list[Size], outputs: list[Size]) -> int | None:
    """ONNX's Attention (queries, keys, values) and ONNX Runtime's (input (b, s, k), packed weight (k, q + k + v))."""
    if len(outputs) != 1:  # a cache: the length attended to is not in these shapes
        return None
    query, second = inputs[0], inputs[1]
    output = math.prod(outputs[0])
    if len(second) == 2:
        tokens = query[0] * query[1]
        hidden = (second[1] - outputs[0][-1]) // 2
        return 2 * tokens * query[2] * second[1] + 2 * query[1] * (tokens * hidden + output)
    length = second[2] if len(second) == 4 else second[1]
    return 2 * length * (math.prod(query) + output)


def _multi_head_attention(inputs: list[Size], outputs: list[Size]) -> int | None:
    """ONNX Runtime's MultiHeadAttention: three tensors, or queries, keys and values packed as (b, s, heads, 3, h)."""
    if len(outputs) != 1:
        return None
    query, output = inputs[0], math.prod(outputs[0])
    if len(query) == 5:
        return 2 * query[1] * (math.prod(query) // 3 + output)
    key = inputs[1]
    length = key[2] if len(key) == 4 else key[1]
    return 2 * length * (math.prod(query) + output)


_RULES: Mapping[str, Callable[[list[Size], list[Size]], int | None]] = {
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "QLinearMatMul": _matmul,
    "MatMulNBits": _matmul,
    "FusedMatMul": _transposable_matmul,
    "Gemm": _gemm,
    "FusedGemm": _gemm,
    "QGemm": _gemm,
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "Attention": _attention,
    "QAttention": _attention,
    "MultiHeadAttention": _multi_head_attention,
}

# ONNX Runtime's own operators with no product in them, as its fusions and quantiser leave them
_LIGHT = frozenset(
    [
        "BiasGelu",
        "BiasSoftmax",
        "BiasSplitGelu",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "EmbedLayerNormalization",
        "FastGelu",
        "FusedElementwise",
        "GatherBlockQuantized",
        "GroupNorm",
        "MemcpyFromHost",
        "MemcpyToHost",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QuantizeLinear",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipGroupNorm",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    ]
)
# standard operators whose work is not in their shapes alone
_HEAVY = frozenset(["DFT", "DeformConv", "Det", "Einsum", "GRU", "LSTM", "RNN", "STFT"])


def _is_standard(name: str) -> bool:
    import onnx.defs

    return bool(onnx.defs.has(name))


def _profile(graph: Path, feeds: Mapping[str, Array]) -> list[tuple[str, list[Size], list[Size]]]:
    """Every operator executed, with its input and output shapes.

    Prepacking is off: a weight that was packed for its kernel no longer shows among the operator's inputs.
    """
    import tempfile

    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="deployfa-flops-") as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(graph), sess_options=options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    executed = [event["args"] for event in events if event.get("cat") == "Node" and "op_name" in event.get("args", {})]
    return [(args["op_name"], _sizes(args["input_type_shape"]), _sizes(args["output_type_shape"])) for args in executed]


def _sizes(typed: list[dict[str, Any]]) -> list[Size]:
    """``[{"float": [2, 16, 384]}]`` → ``[[2, 16, 384]]``."""
    return [[int(size) for size in shape] for entry in typed for shape in entry.values()]
