"""Find an adapter's sites in a graph that this project did not export, and say how each was found.

Such a graph has no module paths.  What it may have: initializers named after parameters, nodes named after modules
(the legacy exporter's ``/encoder/layer.0/dense/MatMul``), biases that kept their names where the weights lost theirs,
or none of it but the weights themselves, which can be compared with those of the adapter's base.  What was found is
written onto the nodes as module paths, after which the graph is as good as an exported one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common.shape_inference import infer_shapes

from deployfa.edits import Array, Float64
from deployfa.errors import BaseMismatchError, SiteError
from deployfa.graph.calls import calls_of, modules, scope_of
from deployfa.graph.layers import Use, layers, module_path
from deployfa.graph.weights import canonical
from deployfa.naming import SCOPES, same_path

__all__ = ["Located", "locate_sites"]

#: What quantisers and exporters append to the name of a parameter.
_SUFFIXES = (
    *("_quantized", "_Q4", "_Q8", "_DQ", "_Transposed", "_transposed", "_qweight", "_fp16"),
    *(".T", ".weight", ".qweight", ".quant_weight"),
)
#: A quantised weight is taken for its original when it is this near: int4 in blocks is at about 0.1, another layer at
#: about 1.4 (two unrelated matrices of one size).
_NEAR = 0.5


@dataclass(frozen=True, eq=False)
class Located:
    """A site, the nodes that run it, and the evidence."""

    site: str
    uses: tuple[Use, ...]
    how: str

    @property
    def nodes(self) -> list[str]:
        return [use.node.name or use.node.op_type for use in self.uses]

    @property
    def weight(self) -> str:
        return self.uses[0].weight.name


def locate_sites(
    model: ir.Model,
    wanted: Mapping[str, tuple[int, int] | None],
    *,
    named: Mapping[str, str] | None = None,
    base: Mapping[str, Callable[[], Array]] | None = None,
) -> tuple[ir.Model, list[Located]]:
    """A clone of ``model`` whose nodes carry the module paths of ``wanted``, and how each was found.

    ``wanted``: site → (k, d), or ``None`` where the adapter does not say.  ``named``: site → name of an initializer or
    node, which wins.  ``base``: site → how to read the base's own weight, which decides where names do not, and
    contradicts names that are wrong.  Raises ``SiteError`` with the nearest candidates for a site that is not found, or
    found more than once, and ``BaseMismatchError`` if a weight that was found by name is another than the base's.
    """
    result = _with_shapes(model.clone())
    found_layers = _Layers(layers(result.graph))
    called = modules(found_layers.uses)
    located: list[Located] = []
    for site, size in wanted.items():
        read = (base or {}).get(site)
        weight = read() if read is not None else None
        uses, how = _find(site, size, found_layers, (named or {}).get(site), weight, compared=base is not None)
        if weight is not None and not any(_same_weight(use, weight) for use in uses[:1]):
            raise BaseMismatchError(
                f"site '{site}' was found by {how}, but its weight is not the base model's; pass the graph of that "
                "base, or leave --model out"
            )
        if site not in (named or {}):
            uses = calls_of(site, uses, found_layers.uses, called)
        located.append(Located(site, tuple(uses), how))
    _check_apart(located)
    for each in located:
        for use in each.uses:
            for node in {use.node, use.bias_node or use.node}:
                node.metadata_props[SCOPES] = repr(["", each.site, node.op_type.lower()])
    return result, located


def _with_shapes(model: ir.Model) -> ir.Model:
    """Infer the shapes and types that the exporter left out: planning looks at them.  What cannot be inferred stays
    unknown."""
    missing = {value.name: value for node in model.graph for value in node.outputs if value.shape is None}
    if not missing:
        return model
    plain = model.clone()
    for node in list(plain.graph):
        if node.op_type == "MatMulNBits" and node.domain == "com.microsoft":
            _as_matmul(plain.graph, node)
    # not strict: operators of a vendor have no rule, and what follows them stays unknown
    infer_shapes(plain, check_type=False, strict_mode=False)
    for node in plain.graph:
        for inferred in node.outputs:
            value = missing.get(inferred.name)
            if value is not None:
                value.shape, value.type = inferred.shape, value.type or inferred.type
    return model


def _as_matmul(graph: ir.Graph, node: ir.Node) -> None:
    """A MatMul of the same shape in the place of a MatMulNBits, for which shape inference has no rule."""
    k, n = (node.attributes.get_int(name, 0) for name in ("K", "N"))
    scales, old = node.inputs[2], node.outputs[0]
    kind = ir.TensorType((scales.dtype if scales is not None else None) or ir.DataType.FLOAT)
    weight = ir.Value(name=f"{old.name}/weight", shape=ir.Shape([k, n]), type=kind)
    graph.inputs.append(weight)
    made = ir.node("MatMul", [node.inputs[0], weight])
    made.outputs[0].name = old.name
    graph.insert_before(node, made)
    old.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Layers:
    """The layers of a graph by every name that they may go by."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = uses
        self.by_path = self._index((module_path(use.node), use) for use in uses)
        self.by_weight = self._index((_parameter(use.weight.name), use) for use in uses)
        self.by_node = self._index((scope_of(use), use) for use in uses)
        self.by_bias = self._index(
            ((use.bias.name if use.bias is not None else "").removesuffix(".bias"), use)
            for use in uses
            if use.bias is not None and use.bias.name.endswith(".bias")
        )

    @staticmethod
    def _index(pairs: Iterable[tuple[str | None, Use]]) -> dict[str, list[Use]]:
        index: dict[str, list[Use]] = {}
        for name, use in pairs:
            if name:
                index.setdefault(name, []).append(use)
        return index

    def literally(self, name: str) -> list[Use]:
        """Layers whose weight, or whose node, is called ``name``."""
        return [use for use in self.uses if name in {use.weight.name, use.weight.operand.name, use.node.name}]

    def names(self) -> list[str]:
        return sorted({use.weight.name for use in self.uses})


def _find(
    site: str, size: tuple[int, int] | None, known: _Layers, name: str | None, weight: Array | None, *, compared: bool
) -> tuple[list[Use], str]:
    if name is not None:
        uses = _alike(known.literally(name))
        if len(uses) != 1:
            what = "no layer has" if not uses else "several layers have"
            raise SiteError(
                f"site '{site}': {what} a weight or node called '{name}'; {_candidates(site, size, known, name)}"
            )
        return uses[0], f"--sites: '{name}'"
    evidence = (
        ("module path", known.by_path),
        ("initializer name", known.by_weight),
        ("bias name", known.by_bias),
        ("node name", known.by_node),
    )
    several = ""
    for how, index in evidence:
        labels = same_path(site, index)
        fitting = [group for group in _alike(use for each in labels for use in index[each]) if _fits(group[0], size)]
        if len(fitting) == 1:
            label = next(each for each in labels if fitting[0][0] in index[each])
            return fitting[0], f"{how} '{label}'"
        if fitting and not several:
            # a bias that the exporter merged names many layers; what comes next may tell them apart
            several = f"fits several layers by {how}: {', '.join(group[0].weight.name for group in fitting[:4])}"
    if weight is not None:
        near = _alike([use for use in known.uses if _fits(use, size) and _same_weight(use, weight)])
        if len(near) == 1:
            return near[0], f"comparing weights: '{near[0][0].weight.name}'"
        if near:
            names = ", ".join(group[0].weight.name for group in near[:4])
            raise SiteError(f"site '{site}' has the weight of several layers: {names}; name one in --sites")
    hint = "" if compared else ", or pass the base model with --model to compare weights"
    if several:
        raise SiteError(f"site '{site}' {several}; name one in --sites{hint}")
    raise SiteError(f"site '{site}' not found; {_candidates(site, size, known, site)}{hint}")


def _alike(uses: Iterable[Use]) -> list[list[Use]]:
    """Uses of one stored weight together: a module that is called twice."""
    groups: dict[ir.Value, list[Use]] = {}
    for use in uses:
        groups.setdefault(use.weight.stored, []).append(use)
    return list(groups.values())


def _fits(use: Use, size: tuple[int, int] | None) -> bool:
    return size is None or all(want in {have, -1} for want, have in zip(size, _size(use), strict=True))


def _size(use: Use) -> tuple[int, int]:
    return use.features("in"), use.features("out")


def _same_weight(use: Use, weight: Array) -> bool:
    """Whether a layer has ``weight``: to its own rounding, or as near as quantisation leaves it."""
    if not use.weight.is_constant:
        return False
    numbers = canonical(use.weight.numbers(), use.layout, use.groups)
    ours = weight if weight.shape == numbers.shape else weight.T if weight.ndim == 2 else weight
    choices = [ours, weight.T] if weight.ndim == 2 and weight.shape[0] == weight.shape[1] else [ours]
    return any(choice.shape == numbers.shape and _near(use, numbers, choice) for choice in choices)


def _near(use: Use, numbers: Array, weight: Array) -> bool:
    if not use.weight.quantised:
        # either may be a copy of the other that was rounded once
        coarser = min(numbers.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
        return bool(np.array_equal(numbers.astype(coarser), weight.astype(coarser)))
    w: Float64 = weight.astype(np.float64)
    return float(np.linalg.norm(numbers - w)) <= _NEAR * float(np.linalg.norm(w))


def _check_apart(located: Sequence[Located]) -> None:
    owners: dict[ir.Node, str] = {}
    for each in located:
        for use in each.uses:
            other = owners.setdefault(use.node, each.site)
            if other != each.site:
                raise SiteError(
                    f"sites '{other}' and '{each.site}' are both found at '{each.weight}'; name both in --sites"
                )


def _candidates(site: str, size: tuple[int, int] | None, known: _Layers, near: str) -> str:
    """The layers of the same size, nearest names first."""
    import difflib

    fitting = {use.weight.name: use for use in known.uses if _fits(use, size)}
    names = difflib.get_close_matches(near, list(fitting), n=4, cutoff=0.0)
    if not names:
        sizes = sorted({_size(use) for use in known.uses})
        shown = ", ".join(f"{k}→{d}" for k, d in sizes[:6])
        return f"no layer of the graph has its size ({size}); sizes there: {shown or 'none'}"
    listed = ", ".join(
        f"'{name}' ({fitting[name].node.op_type}, {'→'.join(map(str, _size(fitting[name])))})" for name in names
    )
    return f"nearest layers of its size: {listed}; name one in --sites"


def _parameter(name: str) -> str:
    """``bert.encoder.layer.0.dense.weight.T_quantized`` → ``bert.encoder.layer.0.dense``."""
    stripped = True
    while stripped:
        stripped = False
        for suffix in _SUFFIXES:
            if name.endswith(suffix):
                name, stripped = name.removesuffix(suffix), True
    return name
