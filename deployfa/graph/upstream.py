"""Placements ``norm`` and ``producer``: let what comes before a site make T(x), for all its readers at once.

Sites whose paths meet form a group; a group folds whole or not at all, because a value that changes changes for
everything that reads it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from deployfa.edits import Edit, Float64
from deployfa.graph.backwards import backwards
from deployfa.graph.carry import Blocked, Carried
from deployfa.graph.layers import Use, layers
from deployfa.graph.norm import Norm, fold_into_norms
from deployfa.graph.own_weight import alone, why_not_use_scaled
from deployfa.graph.producer import fold_into_producers, producer_bytes
from deployfa.graph.sites import Site
from deployfa.graph.trace import Path, paths

__all__ = ["Group", "Upstream", "find_upstream", "fold_upstream"]

_NOTHING: Mapping[str, str] = MappingProxyType({})
#: Operators that read a value's shape and none of its numbers.
_ONLY_SHAPE = {"Shape", "Size"}
_PARTS = {"Slice", "Split", "Gather"}


@dataclass(frozen=True, eq=False)
class Group:
    """Sites that fold together, and where into: norms, or the rows of layers before them."""

    kind: str
    paths: tuple[tuple[str, Path], ...]

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(site for site, _ in self.paths))

    @property
    def ends(self) -> list[tuple[Norm | Use, Carried]]:
        """Every norm or layer once, with what must become of its output."""
        found: dict[ir.Value, tuple[Norm | Use, Carried]] = {}
        for _, path in self.paths:
            found.setdefault(path.maker, (path.end, path.change))
        return list(found.values())

    @property
    def bytes(self) -> int:
        """What a patch of the group ships; a stored tensor that several ends share counts once."""
        sizes: dict[int, int] = {}
        for end, _ in self.ends:
            if isinstance(end, Norm):
                sizes[id(end.scale)] = end.bytes
            else:
                sizes[id(end.weight.stored)] = producer_bytes(end)
        return sum(sizes.values())

    @property
    def through(self) -> tuple[str, ...]:
        return max((path.through for _, path in self.paths), key=len)


@dataclass(frozen=True, eq=False)
class Upstream:
    """What can fold upstream: site → its group, and for every other site the reason why it cannot."""

    groups: Mapping[str, Group]
    reasons: Mapping[str, str]


class _Disagree(Blocked):
    """Two sites ask for different changes of one value."""

    def __init__(self, kind: str, first: str, second: str) -> None:
        super().__init__(f"{kind} also feeds '{second}', whose edit is another")
        self._kind, self._first, self._second = kind, first, second

    def told_to(self, site: str) -> str:
        other = self._first if site == self._second else self._second
        return f"{self._kind} also feeds '{other}', whose edit is another"


def find_upstream(
    graph: ir.Graph,
    sites: Mapping[str, Site],
    edits: Mapping[str, Edit],
    *,
    busy: Mapping[str, str] = _NOTHING,
    kinds: Sequence[str] = ("norm", "producer"),
) -> Upstream:
    """Groups among ``edits`` (by site) that fold exactly into norms or layers before them.

    ``busy``: sites into whose rows nothing may fold, and why: what stands beside the layer, or has its scale.
    """
    uses = layers(graph)
    makers = {use.output: use for use in uses}
    reasons: dict[str, str] = {}
    found: dict[str, list[list[Path]]] = {}
    for name, edit in edits.items():
        try:
            found[name] = paths(sites[name], edit, makers)
        except Blocked as blocked:
            reasons[name] = str(blocked)
    wanted = {edge for of_site in found.values() for of_use in of_site for path in of_use for edge in path.edges}
    chosen: dict[str, list[Path]] = {}
    for name, of_site in found.items():
        try:
            chosen[name] = _one_kind([_open(of_use, wanted) for of_use in of_site], kinds)
        except Blocked as blocked:
            reasons[name] = str(blocked)
    groups: dict[str, Group] = {}
    names = {use.node: name for name, site in sites.items() for use in site.uses}
    for members in _meeting(chosen):
        group = Group(chosen[members[0]][0].kind, tuple((name, path) for name in members for path in chosen[name]))
        try:
            _check(group, uses, names, busy)
        except _Disagree as blocked:
            reasons |= {member: blocked.told_to(member) for member in members}
        except Blocked as blocked:
            reasons |= dict.fromkeys(members, str(blocked))
        else:
            groups |= dict.fromkeys(members, group)
    return Upstream(groups, reasons)


def fold_upstream(graph: ir.Graph, group: Group) -> None:
    """Fold every site of ``group`` into its norms or producers."""
    name = group.sites[0]
    norms: list[tuple[Norm, Carried]] = []
    layers_before: list[tuple[Use, Carried]] = []
    for end, change in group.ends:
        if isinstance(end, Norm):
            norms.append((end, change))
        else:
            layers_before.append((end, change))
    # one stored vector changes once, for all the norms that share it
    by_scale: dict[ir.Value, list[tuple[Norm, Carried]]] = {}
    for norm, change in norms:
        by_scale.setdefault(norm.scale, []).append((norm, change))
    for together in by_scale.values():
        first, wanted = together[0]
        alike = [norm for norm, change in together if change.same(wanted) and norm.reads_as(first)]
        fold_into_norms(graph, alike, wanted, name)
        for norm, change in together:
            if norm not in alike:
                fold_into_norms(graph, [norm], change, name)
    by_weight: dict[ir.Value, list[tuple[Use, Carried]]] = {}
    for use, change in layers_before:
        by_weight.setdefault(use.weight.stored, []).append((use, change))
    for shared in by_weight.values():
        fold_into_producers(graph, [use for use, _ in shared], rows(shared[0][0], shared[0][1]), name)


def rows(use: Use, change: Carried) -> Float64:
    """``change`` of a layer's output as one factor for each of its d rows; raises ``Blocked`` if it is not one."""
    rank = change.factor.ndim
    axis = 1 if use.convolves else rank - 1
    if change.shift is not None:
        raise Blocked("δ would need a bias of the layer before, and it passes no product")
    if any(size != 1 for at, size in enumerate(change.factor.shape) if at != axis):
        raise Blocked("1+λ varies over more than the outputs of the layer before")
    if change.factor.size not in {1, use.features("out")}:
        raise Blocked("what is added to the layer before is wider than its output")
    return np.asarray(np.broadcast_to(change.factor.reshape(-1), (use.features("out"),)))


def _open(found: list[Path], wanted: Collection[tuple[ir.Node, int]]) -> list[Path]:
    """Of several ways upstream (either operand of a product) those that only other paths share; all if there is none,
    so that the check can say what stands in the way."""
    ways = [
        path
        for path in found
        if all(
            edge in wanted or edge[0].op_type in _ONLY_SHAPE or _reads_unchanged(*edge, change)
            for value, change in path.values.items()
            for edge in value.uses()
        )
    ]
    return ways or found


def _one_kind(found: list[list[Path]], kinds: Sequence[str]) -> list[Path]:
    """One path for every use, all of one kind; norms first, they are the smaller change."""
    for kind in kinds:
        first = [next((path for path in of_use if path.kind == kind), None) for of_use in found]
        if all(path is not None for path in first):
            return [path for path in first if path is not None]
    raise Blocked("its calls come from different places")


def _meeting(chosen: Mapping[str, list[Path]]) -> list[list[str]]:
    """Sites whose paths share a maker, or a producer's stored weight, transitively."""
    group_of: dict[str, int] = {name: number for number, name in enumerate(chosen)}
    owner: dict[object, str] = {}
    for name, found in chosen.items():
        for path in found:
            keys: list[object] = [path.maker]
            if isinstance(path.end, Use):
                keys.append(path.end.weight.stored)
            for key in keys:
                other = owner.setdefault(key, name)
                if group_of[other] != group_of[name]:
                    old, new = group_of[name], group_of[other]
                    group_of = {each: new if number == old else number for each, number in group_of.items()}
    together: dict[int, list[str]] = {}
    for name, number in group_of.items():
        together.setdefault(number, []).append(name)
    return list(together.values())


def _check(group: Group, uses: Sequence[Use], names: Mapping[ir.Node, str], busy: Mapping[str, str]) -> None:
    """Raise ``Blocked`` unless every reader of every value on the paths gets what it should."""
    values: dict[ir.Value, tuple[Carried, str]] = {}
    edges: set[tuple[ir.Node, int]] = set()
    for name, path in group.paths:
        edges |= path.edges
        for value, change in path.values.items():
            known, first = values.setdefault(value, (change, name))
            if not known.same(change):
                raise _Disagree(group.kind, first, name)
    for value, (change, _) in values.items():
        if value.is_graph_output():
            raise Blocked(f"{group.kind} is also an output of the graph")
        for node, index in value.uses():
            if (node, index) in edges or node.op_type in _ONLY_SHAPE or _reads_unchanged(node, index, change):
                continue
            other = names.get(node)
            raise Blocked(
                f"{group.kind} also feeds '{other}', whose edit is another"
                if other is not None and index == 0
                else f"{group.kind} also feeds {node.op_type} '{node.name}'"
            )
    for node in {node for node, _ in edges if node.op_type == "Split"}:
        _check_other_parts(group.kind, node, values)
    for end, change in group.ends:
        if isinstance(end, Norm):
            blocked = end.why_not(change)
        elif (owner := names.get(end.node, "")) in busy:
            blocked = f"layer before, '{owner}', {busy[owner]}"
        else:
            blocked = _why_not_rows(end, change, group, uses)
        if blocked is not None:
            raise Blocked(blocked)


def _check_other_parts(kind: str, split: ir.Node, values: Mapping[ir.Value, tuple[Carried, str]]) -> None:
    """The parts of a split that are on no path change with the whole: nothing may read them, unless they stay as they
    are."""
    whole = split.inputs[0]
    assert whole is not None  # a path has come through it
    for part in split.outputs:
        read = part.is_graph_output() or any(use.node.op_type not in _ONLY_SHAPE for use in part.uses())
        if read and part not in values and not _part_unchanged(split, part, values[whole][0]):
            raise Blocked(f"{kind} also feeds another part of Split '{split.name}'")


def _why_not_rows(end: Use, change: Carried, group: Group, uses: Sequence[Use]) -> str | None:
    """What keeps ``change`` out of the rows of the layer before."""
    factor = rows(end, change)
    if end.weight.embeds:
        return "weight of the layer before is tied to the embedding"
    if end.integer:
        return "layer before is computed in integers"
    sharing = [use for use in uses if use.weight.stored is end.weight.stored]
    ends = [each for each, _ in group.ends]
    if any(use not in ends or not use.reads_as(end) for use in sharing) or any(
        not np.array_equal(rows(each, other), factor)
        for each, other in group.ends
        if isinstance(each, Use) and each.weight.stored is end.weight.stored
    ):
        return "layer before shares its weight with another one"
    blocked = why_not_use_scaled(end, "out", factor, {use.node for use in sharing})
    if blocked is not None:
        return f"of the layer before, the {blocked}"
    if end.bias_value is None:
        return None
    bias = end.bias
    if bias is None or bias.is_input or not bias.is_constant:
        return "bias of the layer before is computed"
    if bias.scales is not None:
        if not alone(bias, {use.bias_node for use in sharing if use.bias_node is not None}):
            return "bias of the layer before is quantised and shared with another layer"
        blocked = bias.scales.why_not(len(bias.scales.size) - 1, factor)
        return None if blocked is None else f"of the layer before, the bias: {blocked}"
    return None


def _reads_unchanged(node: ir.Node, index: int, change: Carried) -> bool:
    """Whether ``node`` reads only a part of a value, and the change leaves that part as it is."""
    if index != 0 or node.op_type not in _PARTS or node.domain not in {"", "ai.onnx"}:
        return False
    return all(_part_unchanged(node, output, change) for output in node.outputs)


def _part_unchanged(node: ir.Node, output: ir.Value, change: Carried) -> bool:
    """Scale the part by 2: if the change of the whole that this asks for differs from 1 nowhere that ``change`` does,
    the part is left alone."""
    shape = output.shape
    if shape is None:
        return False
    # the part as a probe: 2 where it reads, 1 elsewhere
    rank = len(shape)
    full = [dim if isinstance(dim, int) else 1 for dim in shape]
    probe = Carried(np.full(full if rank else (), 2.0))
    try:
        steps = backwards(node, output, probe)
    except Blocked:
        return False
    (_, whole), *_ = steps
    reads = whole.factor != 1.0
    alters = change.factor != 1.0
    if change.shift is not None:
        alters = alters | (change.shift != 0.0)
    return not bool((reads & alters).any())
