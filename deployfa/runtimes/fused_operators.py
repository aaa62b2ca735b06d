"""Which fused operators a session really runs: those our libraries made and those ONNX Runtime makes at load.

ONNX Runtime writes the graph that it is about to run to ``SessionOptions.optimized_model_filepath``.  It is asked for
at ``ORT_ENABLE_EXTENDED``: that level makes every fusion, and the same ones on every processor; the one level above it
only rearranges the memory of convolutions for the processor at hand, which is no fusion and would make a manifest
depend on the machine that wrote it.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError

__all__ = ["fused_operators", "session_file", "session_graph"]

#: Operators of the ONNX standard that stand for several others, so that a fusion can make one.  (ONNX Runtime keeps its
#: ``SimplifiedLayerNormalization`` in the standard's domain.)  Of other standard operators more or fewer says nothing:
#: optimisers move reshapes and fold constants.
_COMPOSITE = frozenset(
    {
        "Attention",
        "Gelu",
        "Gemm",
        "GroupNormalization",
        "HardSwish",
        "InstanceNormalization",
        "LayerNormalization",
        "Mish",
        "RMSNormalization",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "Swish",
    }
)
_STANDARD = {"", "ai.onnx"}
_LEVELS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED"}
_ATTENTION = {"GroupQueryAttention", "MultiHeadAttention"}
_DENSE = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"}


def fused_operators(graph: Path, unfused: ir.Model) -> dict[str, int]:
    """How many of each fused operator a session of ``graph`` runs that ``unfused``, the graph before fusing, has not.

    Keys are ``domain::type``, the bare type for the standard's own; besides:

    - ``packed MatMul (3 in 1)``: one product for three weights side by side, its result split in three.  How many are
      in one matters: an edit of the queries alone leaves keys and values packed, two in one.
    - ``… (packed QKV)``: an attention that takes queries, keys and values as one tensor.

    Raises ``InputError`` if there is no such graph, ``MissingExtraError`` without onnxruntime, and
    ``RuntimeTargetError`` if it does not load.
    """
    return _beyond(_operators(session_graph(graph)), _operators(unfused))


def session_graph(graph: Path) -> ir.Model:
    """The graph that ONNX Runtime makes of ``graph``, without the weights; see the module's docstring for the level."""
    with session_file(graph) as written:
        model = ir.load(written)
        # structure only: what lay in the scratch folder is gone after this
        for each in (model.graph, *model.graph.subgraphs()):
            for value in each.initializers.values():
                value.const_value = None
    return model


@contextlib.contextmanager
def session_file(graph: Path | bytes, *, level: Literal["none", "basic", "extended"] = "extended") -> Iterator[Path]:
    """Yield the file to which ONNX Runtime wrote what it makes of ``graph`` on the CPU; it is gone afterwards.

    level: of its optimisations; ``basic`` gives what it shares out among the providers.  Raises what
    ``fused_operators`` raises.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu", "finding out what a session fuses") from error
    if isinstance(graph, Path) and not graph.is_file():
        raise InputError(f"no graph at '{graph}'; pass an .onnx file")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    with tempfile.TemporaryDirectory(prefix="deployfa-session-") as scratch:
        written = Path(scratch) / "session.onnx"
        options.optimized_model_filepath = str(written)
        # beside the graph, or more than 2 GB of weights would not fit into it
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "session.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        _load(ort, graph, options)
        yield written


def _load(ort: Any, graph: Path | bytes, options: Any) -> None:
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        ort.InferenceSession(source, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shown = "the graph" if isinstance(source, bytes) else f"'{source}'"
        raise RuntimeTargetError(f"onnxruntime does not load {shown} ({text}); export it again") from error


def _operators(model: ir.Model) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        counts[_name(node)] += 1
        if (packed := _packed(node)) > 1:
            counts[f"packed MatMul ({packed} in 1)"] += 1
    return counts


def _name(node: ir.Node) -> str:
    if node.domain in _STANDARD:
        return node.op_type
    packed = node.op_type in _ATTENTION and not any(node.inputs[1:3])
    return f"{node.domain}::{node.op_type}{' (packed QKV)' if packed else ''}"


def _packed(node: ir.Node) -> int:
    """Into how many parts ``node`` splits a product with constant weights, a bias allowed between; 0 if it does not."""
    if node.op_type != "Split" or node.domain not in _STANDARD or node.inputs[0] is None:
        return 0
    producer = node.inputs[0].producer()
    if producer is not None and producer.op_type == "Add":
        producer = next((p for value in producer.inputs if value is not None and (p := value.producer())), None)
    dense = producer is not None and producer.op_type in _DENSE
    return len(node.outputs) if dense else 0


def _beyond(session: Counter[str], unfused: Counter[str]) -> dict[str, int]:
    beyond = {name: count - unfused[name] for name, count in session.items() if _is_fused(name)}
    return {name: count for name, count in sorted(beyond.items()) if count > 0}


def _is_fused(name: str) -> bool:
    return "::" in name or name in _COMPOSITE or name.startswith("packed ")
