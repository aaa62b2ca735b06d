"""Which provider got which node of a session, and which nodes fell back to another than the one asked for.

ONNX Runtime says so itself: a session made with ``session.record_ep_graph_assignment_info`` tells which provider took
which node, right after its basic optimisations.  (``session.disable_cpu_ep_fallback`` is no substitute: it refuses the
shape arithmetic that every provider leaves to the CPU, and names nothing.)

Not every node elsewhere fell back.  The rule: **a node fell back if it computes with numbers**, that is, if it reads
or writes a tensor with at least one axis of floats, or of integers of 16 bits and fewer, which are numbers quantised.
What does not count:

- ``Shape`` and ``Size``, which read a tensor's shape and none of its numbers;
- integers of 32 and 64 bits, booleans and strings: positions, token numbers, masks, which providers leave to the CPU on
  purpose, because to move one costs more than to compute it;
- scalars, for the same reason;
- *shape arithmetic* in floats (the scales of a ``Resize``): nothing but shapes and constants of at most
  ``SMALL_CONSTANT`` elements is behind the node, and nothing that it touches has more than one axis.  (A causal mask
  that is made of shapes alone is as large as its tokens squared; it counts.)

A tensor of unknown type counts as numbers, and so does a node that is not found again in the graph: in doubt it fell
back.  Nodes are those of the graph that ONNX Runtime itself writes out at the same level of optimisation, types what
that graph says and ONNX's own inference adds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from deployfa.errors import RuntimeTargetError
from deployfa.naming import SCOPES, module_path_of
from deployfa.runtimes.fused_operators import session_file

__all__ = ["RECORD", "SMALL_CONSTANT", "Fallback", "check_assignment", "fallbacks"]

#: The session option without which a session does not tell.
RECORD = "session.record_ep_graph_assignment_info"
#: ONNX Runtime's own bound (``kSmallInitializerThreshold``) for a constant that goes to the CPU with shape arithmetic.
SMALL_CONSTANT = 100

_INDICES = {
    ir.DataType.BOOL,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.STRING,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
}
_STANDARD = {"", "ai.onnx"}
_SHOWN = 6

#: name, operator, domain: what ONNX Runtime tells of a node.  Names may be empty or shared.
_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Fallback:
    """A node that computes with numbers on another provider than the one asked for.

    module: its PyTorch module path, where the graph says; empty where it does not.
    """

    name: str
    operator: str
    provider: str
    module: str

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"'{self.name}' ({self.operator}{where})" if self.name else f"an unnamed {self.operator}{where}"


def fallbacks(session: Any, wanted: str, graph: Path | bytes, *, optimize: bool = True) -> list[Fallback]:
    """The nodes of ``session`` that should run on ``wanted`` and do not, in the session's order.

    session: of ``graph``, made with ``RECORD``; optimize: whether it was made with optimisations.  Where every node is
    on ``wanted`` this costs nothing; else the graph is loaded once more, on the CPU, to learn its types.
    """
    elsewhere = [
        ((node.name, node.op_type, _domain(node.domain)), subgraph.ep_name)
        for subgraph in session.get_provider_graph_assignment_info()
        if subgraph.ep_name != wanted
        for node in subgraph.get_nodes()
    ]
    if not elsewhere:
        return []
    numbers = _computing(_partitioned(graph, optimize=optimize))
    fallen = [(key, provider) for key, provider in elsewhere if numbers.get(key, True)]
    if not fallen:
        return []
    modules = _modules(graph)
    return [
        Fallback(name, f"{domain}::{operator}" if domain else operator, provider, _module(name, modules))
        for (name, operator, domain), provider in fallen
    ]


def check_assignment(session: Any, wanted: str, graph: Path | bytes, *, optimize: bool = True) -> None:
    """Raise ``RuntimeTargetError``, with the names of the nodes, if any fell back; see ``fallbacks``."""
    found = fallbacks(session, wanted, graph, optimize=optimize)
    if not found:
        return
    total = sum(len(subgraph.get_nodes()) for subgraph in session.get_provider_graph_assignment_info())
    shown = ", ".join(map(str, found[:_SHOWN]))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    others = ", ".join(sorted({each.provider for each in found}))
    fused = any("::" in each.operator for each in found)
    first = "export the bundle again with --optimize none, which keeps to standard operators, or " if fused else ""
    raise RuntimeTargetError(
        f"asked for {wanted}, but {len(found)} of {total} nodes fell back to {others}: {shown}{more}; "
        f"{first}pick the target onnxruntime-cpu"
    )


def _partitioned(graph: Path | bytes, *, optimize: bool) -> ir.Model:
    """What the providers shared out among them, with types."""
    model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
    if any(node.op_type == "EPContext" for node in model.graph.node):
        # compiled for one provider: no other session loads it, and nothing is optimised any more
        return ir.from_proto(onnx.shape_inference.infer_shapes(model))
    with session_file(graph, level="basic" if optimize else "none") as written:
        # the weights stay where they are: only their shapes matter
        return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(written, load_external_data=False)))


def _computing(model: ir.Model) -> dict[_Key, bool]:
    """For every node whether it computes with numbers; where several have one key, whether any of them does."""
    from_shapes: set[int] = set()
    found: dict[_Key, bool] = {}
    for node in model.graph.all_nodes():
        key = (node.name or "", node.op_type, _domain(node.domain))
        arithmetic = _is_shape_arithmetic(node, from_shapes)
        if arithmetic:
            from_shapes.update(id(value) for value in node.outputs)
        found[key] = found.get(key, False) or _computes(node, arithmetic=arithmetic)
    return found


def _is_shape_arithmetic(node: ir.Node, from_shapes: set[int]) -> bool:
    """Whether nothing but shapes and small constants is behind ``node``; ``from_shapes``: ids of values known so."""
    if _reads_shape_only(node):
        return True
    if any(
        attribute.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS} for attribute in node.attributes.values()
    ):
        return False
    return all(id(value) in from_shapes or _is_small_constant(value) for value in node.inputs if value is not None)


def _computes(node: ir.Node, *, arithmetic: bool) -> bool:
    if _reads_shape_only(node):
        return False
    touched = list(_tensors(node))
    if arithmetic and all(_axes(value) <= 1 for value in touched):
        return False
    return any(_axes(value) > 0 and value.dtype not in _INDICES for value in touched)


def _reads_shape_only(node: ir.Node) -> bool:
    return node.op_type in {"Shape", "Size"} and node.domain in _STANDARD


def _tensors(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in (*node.inputs, *node.outputs) if value is not None and value.name)


def _axes(value: ir.Value) -> float:
    """Infinitely many where it is not known."""
    return math.inf if value.shape is None else len(value.shape)


def _is_small_constant(value: ir.Value) -> bool:
    if not value.is_initializer() or value.is_graph_input() or value.shape is None:
        return False
    sizes = [size for size in value.shape if isinstance(size, int)]
    return len(sizes) == len(value.shape) and math.prod(sizes) <= SMALL_CONSTANT


def _modules(graph: Path | bytes) -> dict[str, str]:
    model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
    found: dict[str, str] = {}
    for node in _all_nodes(model.graph):
        scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
        found[node.name] = module_path_of(scopes) or ""
    return found


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _module(name: str, modules: dict[str, str]) -> str:
    """ONNX Runtime calls what it makes of a node ``NODE/MatMulAddFusion``."""
    return modules.get(name) or modules.get(name.rpartition("/")[0], "") if name else ""


def _domain(domain: str) -> str:
    return "" if domain in _STANDARD else domain
