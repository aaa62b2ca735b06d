"""Pay nothing while no adapter is active: the fused base graph as one branch, the fused slot graph as the other.

A multiplication by 1 is not free (36 of them cost 4 to 10 % of a small BERT, packed queries, keys and values among what
is lost), and no runtime can leave out what a feed may switch on.  So the graph is one operator::

    logits = If(adapter_active) then (slot graph) else (base graph)

Each branch holds its weights itself, so that a runtime optimises it as the graph that it was; on disk, equal tensors of
the two are one (``deployfa.graph.storage.save_graph(share_equal=True)``).  In memory they are two, each as its branch
wants it packed: that is the price.

``adapter_active`` is float32 of one element, because ONNX Runtime's ``.onnx_adapter`` files hold neither booleans nor
scalars.  Zero is idle.  Source of ``If``: https://onnx.ai/onnx/operators/onnx__If.html
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from deployfa.edits import Array
from deployfa.errors import PlanError
from deployfa.graph.row_defaults import attach_defaults, default_strength
from deployfa.tables.layout import ACTIVE, LABELS

__all__ = ["adapted_branch", "default_active", "idle_branch", "with_idle_branch", "with_row"]

_IDLE, _ADAPTED = "idle", "adapted"


def with_idle_branch(base: ir.Model, slots: ir.Model) -> ir.Model:
    """One graph that is ``base`` until ``adapter_active`` is fed, and ``slots`` from then on.

    base, slots: fused graphs of the same inputs and outputs, but for the tensors of a row, which ``slots`` reads
    besides.  The result takes the inputs of both and ``adapter_active`` (1,), float32; none of them has a default yet
    (see ``with_row``).  Neither graph is changed.  Raises ``PlanError`` if they do not answer the same question.
    """
    _check(base, slots)
    base, slots = base.clone(), slots.clone()
    outputs = [_either(*pair) for pair in zip(base.graph.outputs, slots.graph.outputs, strict=True)]
    inputs = {value.name: _like(value) for value in (*base.graph.inputs, *slots.graph.inputs)}
    active = ir.Value(name=ACTIVE, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    inputs[ACTIVE] = active
    idle, adapted = _branch(base.graph, _IDLE, inputs), _branch(slots.graph, _ADAPTED, inputs)
    # an element that is not zero is true
    chosen = ir.node("Cast", [active], attributes={"to": ir.DataType.BOOL.value}, name="adapter_active/cast")
    chosen.outputs[0].name = "adapter_active/bool"
    chosen.outputs[0].type, chosen.outputs[0].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
    branches = {"then_branch": ir.AttrGraph("then_branch", adapted), "else_branch": ir.AttrGraph("else_branch", idle)}
    choice = ir.Node("", "If", [chosen.outputs[0]], attributes=list(branches.values()), outputs=outputs)
    choice.name = "adapter_active/if"
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=[chosen, choice],
        opset_imports=_merged_opsets(base, slots),
        name="slots",
    )
    return ir.Model(
        graph,
        ir_version=max(base.ir_version, slots.ir_version),
        producer_name=base.producer_name,
        functions=list(_merged_functions(base, slots)),
        metadata_props=dict(base.metadata_props),
    )


def with_row(model: ir.Model, row: Mapping[str, Array], *, active: bool = False) -> ir.Model:
    """A copy whose inputs for the adapter may be left out of a run: then they are ``row``, at full strength.

    ``active``: whether that is what an idle branch leaves the graph to; a graph without one always runs its row.
    """
    result = model.clone()
    values = {**row, **default_strength()}
    if any(value.name == ACTIVE for value in result.graph.inputs):
        values |= default_active(active)
    attach_defaults(result, values)
    return result


def default_active(active: bool) -> dict[str, Array]:
    """``adapter_active`` as it is fed."""
    return {ACTIVE: np.full(1, active, np.float32)}


def idle_branch(model: ir.Model) -> ir.Model:
    """The base graph in a graph of ``with_idle_branch`` as one of its own, to hold the branch against.

    Raises ``PlanError`` if ``model`` has no such branch.
    """
    return _alone(model, "else_branch")


def adapted_branch(model: ir.Model) -> ir.Model:
    """The slot graph in a graph of ``with_idle_branch`` as one of its own; the tensors of a row are plain inputs.

    Raises ``PlanError`` if ``model`` has no such branch.
    """
    return _alone(model, "then_branch")


def _alone(model: ir.Model, which: str) -> ir.Model:
    clone = model.clone()
    choice = next((node for node in clone.graph if node.op_type == "If" and node.name == "adapter_active/if"), None)
    if choice is None:
        raise PlanError("the graph has no idle branch; export it with --slots and without --no-idle-branch")
    branch = choice.attributes[which].as_graph()
    inputs = [
        value
        for value in clone.graph.inputs
        if value.name not in {ACTIVE, LABELS} and (which == "then_branch" or value.name not in clone.graph.initializers)
    ]
    alone = {value.name: _like(value) for value in inputs}
    for value in inputs:
        _redirect(value, alone[value.name], branch)
    for value, outer in zip(branch.outputs, clone.graph.outputs, strict=True):
        value.name = outer.name
    for value in alone.values():
        branch.inputs.append(value)
    branch.opset_imports.update(clone.graph.opset_imports)
    return ir.Model(branch, ir_version=model.ir_version, functions=list(clone.functions.values()))


def _check(base: ir.Model, slots: ir.Model) -> None:
    wanted = [(value.name, value.dtype) for value in base.graph.inputs]
    given = [(value.name, value.dtype) for value in slots.graph.inputs]
    missing = [name for name, dtype in wanted if (name, dtype) not in given]
    if missing:
        raise PlanError(f"the slot graph has no input '{missing[0]}' as the base graph has it; fuse both anew")
    one, other = ([(value.name, value.dtype) for value in each.graph.outputs] for each in (base, slots))
    if one != other:
        raise PlanError(f"the base graph answers {_names(one)}, the slot graph {_names(other)}; fuse both anew")
    if any(value.name == ACTIVE for value in slots.graph.inputs):
        raise PlanError("the slot graph has an idle branch already")


def _names(values: Sequence[tuple[str | None, object]]) -> str:
    return ", ".join(f"'{name}'" for name, _ in values)


def _like(value: ir.Value) -> ir.Value:
    shape = None if value.shape is None else ir.Shape(list(value.shape))
    return ir.Value(name=value.name, shape=shape, type=value.type)


def _branch(graph: ir.Graph, name: str, inputs: Mapping[str | None, ir.Value]) -> ir.Graph:
    """Make ``graph`` read ``inputs`` from around it, and every other name in it start with ``name``."""
    for value in list(graph.inputs):
        _redirect(value, inputs[value.name], graph)
    graph.inputs.clear()
    for each in (graph, *graph.subgraphs()):
        for value in list(each.initializers.values()):
            # a clone shares its tensors, and a value's name is its tensor's too
            value.const_value = _own_name(value.const_value)
        for value in [*each.inputs, *each.initializers.values(), *(o for node in each for o in node.outputs)]:
            # an empty name is an output that nobody asked for
            if value.name:
                value.name = f"{name}/{value.name}"
        for node in each:
            node.name = f"{name}/{node.name}" if node.name else None
    _own_outputs(graph, name)
    graph.name = name
    return graph


def _own_name(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """The same numbers under a name that can be changed alone."""
    if isinstance(tensor, ir.TensorProtoTensor):
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)
    return copy.copy(tensor)


def _redirect(old: ir.Value, new: ir.Value, graph: ir.Graph) -> None:
    for node, index in list(old.uses()):
        node.replace_input_with(index, new)
    for number, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[number] = new


def _own_outputs(graph: ir.Graph, name: str) -> None:
    """A branch must make what it answers: an Identity where that is an input, a constant, or the same value twice."""
    seen: set[int] = set()
    for number, output in enumerate(list(graph.outputs)):
        if output.producer() is None or id(output) in seen:
            copied = ir.node("Identity", [output], name=f"{name}/output_{number}")
            result = copied.outputs[0]
            result.name, result.type, result.shape = f"{name}/output_{number}", output.type, output.shape
            graph.append(copied)
            graph.outputs[number] = result
        seen.add(id(output))


def _either(idle: ir.Value, adapted: ir.Value) -> ir.Value:
    """An output in the shape of both; where they differ (an adapter may bring more labels) the size is open."""
    result = _like(idle)
    one, other = idle.shape, adapted.shape
    if one is None or other is None or len(one) != len(other):
        result.shape = None
    else:
        sizes = (
            mine if str(mine) == str(its) else f"{idle.name}_{axis}"
            for axis, (mine, its) in enumerate(zip(one, other, strict=True))
        )
        result.shape = ir.Shape(list(sizes))
    return result


def _merged_opsets(base: ir.Model, slots: ir.Model) -> dict[str, int]:
    merged = dict(base.graph.opset_imports)
    for domain, version in slots.graph.opset_imports.items():
        if merged.setdefault(domain, version) != version:
            raise PlanError(
                f"the base graph has opset {merged[domain]} of '{domain or 'ai.onnx'}', the slot graph {version}; "
                "use one fusion for both"
            )
    return merged


def _merged_functions(base: ir.Model, slots: ir.Model) -> Iterator[ir.Function]:
    known: dict[object, bytes] = {}
    for model in (base, slots):
        for key, function in model.functions.items():
            content = ir.to_proto(function).SerializeToString(deterministic=True)
            if known.setdefault(key, content) != content:
                raise PlanError(f"both graphs define a function '{function.name}', not the same; use --optimize none")
            if known[key] is content:
                yield function
