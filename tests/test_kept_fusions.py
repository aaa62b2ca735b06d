"""Fusions on the real MiniLM: a fold keeps them all, a side op costs what is derived, a corruption is seen."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.bundle.manifest import FusedCount
from deployfa.edits import Edit
from deployfa.errors import InputError
from deployfa.graph import apply_adapter, make_plan
from deployfa.graph.sites import module_path
from deployfa.kept_fusions import LARGE_BYTES, PlanFusions, compare_fusions, describe_losses, plan_fusions
from deployfa.pipeline import plan_adapter

FUSIONS = ("none", "ort", "ort-sum", "onnxscript")
LAYERS = 6
ATTENTION = ("query", "key", "value")


@pytest.fixture(scope="module")
def adapters(trained: dict[str, Path]) -> dict[str, Adapter]:
    return {name: Adapter.load(path) for name, path in trained.items()}


@pytest.fixture(scope="module")
def graph(adapters: dict[str, Adapter]) -> ir.Model:
    return plan_adapter(adapters["vefa"])[1].load()


@pytest.fixture(scope="module")
def headed(graph: ir.Model, adapters: dict[str, Adapter]) -> ir.Model:
    head = dataclasses.replace(adapters["vefa"], edits={})
    return apply_adapter(graph, head, make_plan(graph, head))


def placed(graph: ir.Model, adapter: Adapter, placement: str) -> ir.Model:
    return apply_adapter(graph, adapter, make_plan(graph, adapter, placement=placement))


def lost(counts: dict[str, FusedCount]) -> dict[str, int]:
    return {name: count.base - count.adapted for name, count in counts.items() if count.base != count.adapted}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("method", ["vefa", "lorfa", "lora"])
def test_a_fold_keeps_every_fusion(graph, headed, adapters, method: str, fusion: str) -> None:
    counts = compare_fusions(headed, placed(graph, adapters[method], "fold"), fusion)
    assert lost(counts) == {}
    # a norm after the attention and one after the feed-forward; the very first norm adds nothing
    skips = counts.get("com.microsoft::SkipLayerNormalization", FusedCount(base=0, adapted=0))
    assert skips.base == (0 if fusion == "ort-sum" else 2 * LAYERS)
    assert counts["com.microsoft::BiasGelu"].base == LAYERS
    attention = {
        "none": "com.microsoft::FusedMatMul",
        "ort": "packed MatMul (3 in 1)",
        "ort-sum": "packed MatMul (3 in 1)",
        "onnxscript": "com.microsoft::MultiHeadAttention",
    }
    assert counts[attention[fusion]].base == LAYERS


@pytest.mark.parametrize("fusion", FUSIONS)
def test_different_edits_on_queries_keys_and_values_cost_their_packing_alone(graph, headed, adapters, fusion) -> None:
    counts = compare_fusions(headed, placed(graph, adapters["vefa"], "side-op"), fusion)
    assert lost(counts) == ({"packed MatMul (3 in 1)": LAYERS} if fusion.startswith("ort") else {})


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_edit_shared_by_all_three_costs_nothing(graph, headed, adapters, fusion: str) -> None:
    own = adapters["vefa"].edits
    edits = {site: own[f"{_block(site)}.query"] if _leaf(site) in ATTENTION else edit for site, edit in own.items()}
    shared = dataclasses.replace(adapters["vefa"], edits=edits)
    assert lost(compare_fusions(headed, placed(graph, shared, "side-op"), fusion)) == {}


def test_what_is_packed_follows_from_who_reads_the_same_tensor(graph, headed, adapters) -> None:
    """Each layer another mixture: none (``-``) or an edit per letter.  Sites with the same letter read one tensor, and
    MatMuls on one tensor are packed, two or three in one."""
    mixtures = ("---", "a--", "aab", "aaa", "abc", "a-a")
    edits: dict[str, Edit] = {}
    own = adapters["vefa"].edits
    for layer, letters in enumerate(mixtures):
        for name, letter in zip(ATTENTION, letters, strict=True):
            prefix = f"bert.encoder.layer.{layer}.attention.self"
            if letter != "-":
                edits[f"{prefix}.{name}"] = own[f"{prefix}.{ATTENTION['abc'.index(letter)]}"]
    mixed = dataclasses.replace(adapters["vefa"], edits=edits)
    counts = compare_fusions(headed, placed(graph, mixed, "side-op"), "ort")
    sizes = Counter(size for letters in mixtures for size in Counter(letters).values())
    assert counts["packed MatMul (3 in 1)"] == FusedCount(base=LAYERS, adapted=sizes[3])
    assert counts["packed MatMul (2 in 1)"] == FusedCount(base=0, adapted=sizes[2])
    # the rest does not sit on the adapted path
    assert {name for name in lost(counts) if not name.startswith("packed")} == set()
    assert describe_losses(counts) == "4 of 6 packed MatMul (3 in 1); it has 3 packed MatMul (2 in 1) more"


@pytest.mark.parametrize("fusion", FUSIONS)
def test_side_ops_away_from_the_attention_cost_nothing(graph, headed, adapters, fusion: str) -> None:
    own = adapters["lora"].edits
    away = dataclasses.replace(adapters["lora"], edits={s: e for s, e in own.items() if _leaf(s) not in ATTENTION})
    counts = compare_fusions(headed, placed(graph, away, "side-op"), fusion)
    # LoRA's A and the layer's own weight read one tensor, so that the one library may pack them: more, never fewer
    assert all(count.adapted >= count.base for count in counts.values())


@pytest.mark.parametrize(
    ("fusion", "op_type", "site", "operand", "operator"),
    [
        ("ort", "MatMul", "attention.self.query", 0, "packed MatMul (3 in 1)"),
        ("none", "Gelu", "intermediate.intermediate_act_fn", 0, "com.microsoft::BiasGelu"),
        ("onnxscript", "MatMul", "attention.self", 0, "com.microsoft::MultiHeadAttention"),
    ],
)
def test_a_no_op_in_a_folded_graph_is_seen_as_a_loss(
    graph, headed, adapters, fusion: str, op_type: str, site: str, operand: int, operator: str
) -> None:
    """A multiplication by ones before one layer's operator: every number stays, the fusion does not."""
    folded = placed(graph, adapters["vefa"], "fold").clone()
    node = next(
        node for node in folded.graph if node.op_type == op_type and module_path(node) == f"bert.encoder.layer.2.{site}"
    )
    value = node.inputs[operand]
    assert value is not None
    width = value.shape[-1]
    one = ir.Value(name="ones", const_value=ir.tensor(np.ones(width, np.float32), name="ones"))
    one.shape, one.type = ir.Shape([width]), ir.TensorType(ir.DataType.FLOAT)
    folded.graph.register_initializer(one)
    product = ir.node("Mul", [value, one], name="no_op")
    product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = "no_op", value.type, value.shape
    folded.graph.insert_before(node, product)
    node.replace_input_with(operand, product.outputs[0])
    counts = compare_fusions(headed, folded, fusion)
    assert counts[operator] == FusedCount(base=LAYERS, adapted=LAYERS - 1)
    assert (describe_losses(counts) or "").startswith(f"1 of {LAYERS} {operator.rpartition('::')[2]}")


def test_a_fused_graph_at_hand_is_not_fused_again(graph, headed, adapters) -> None:
    """What is counted is ``fused``: hand in the wrong one and the counts are the wrong one's."""
    from deployfa.graph.optimize import fuse

    folded, beside = (placed(graph, adapters["vefa"], placement) for placement in ("fold", "side-op"))
    assert lost(compare_fusions(headed, folded, "ort", fused=fuse(folded, "ort"))) == {}
    assert lost(compare_fusions(headed, folded, "ort", fused=fuse(beside, "ort"))) == {"packed MatMul (3 in 1)": LAYERS}


class TestPlanFusions:
    @pytest.fixture
    def planned(self, graph, adapters) -> Callable[..., PlanFusions | None]:
        def plan(placement: str, optimize: str = "auto") -> PlanFusions | None:
            adapter = adapters["vefa"]
            return plan_fusions(graph, adapter, make_plan(graph, adapter, placement=placement), optimize=optimize)

        return plan

    def test_a_plan_without_side_ops_is_not_tried_out(self, planned) -> None:
        assert planned("fold") is None

    def test_side_ops_are_counted_for_every_fusion_and_warned_of(self, planned) -> None:
        found = planned("side-op")
        assert set(found.measured) == set(FUSIONS)
        assert found.skipped == {}
        assert list(found.warnings()) == [
            f"with --optimize {name}, the side ops cost fusions of the runtime: 6 of 6 packed MatMul (3 in 1)"
            for name in ("ort", "ort-sum")
        ]

    def test_a_library_that_is_not_installed_is_named(self, planned, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxscript.rewriter.ort_fusions", None)
        found = planned("side-op")
        assert set(found.measured) == {"none", "ort", "ort-sum"}
        (line,) = [line for line in found.warnings() if "onnxscript" in line]
        assert "not counted" in line and "deployfa[train]" in line

    def test_without_onnxruntime_one_line_says_so(self, planned, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        found = planned("side-op", "none")
        assert found.measured == {}
        (line,) = found.warnings()
        assert "fusions of --optimize none not counted" in line and "deployfa[cpu]" in line

    def test_a_graph_that_takes_too_long_to_copy_is_left(self, planned, monkeypatch: pytest.MonkeyPatch) -> None:
        import deployfa.kept_fusions

        assert LARGE_BYTES > 91e6, "MiniLM itself is counted"
        monkeypatch.setattr(deployfa.kept_fusions, "LARGE_BYTES", 1_000_000)
        (line,) = planned("side-op").warnings()
        assert "0.1 GB of weights" in line

    def test_an_unknown_fusion_is_refused(self, planned) -> None:
        with pytest.raises(InputError, match="use auto or one of: none, ort, ort-sum, onnxscript"):
            planned("side-op", "magic")


def _leaf(site: str) -> str:
    return site.rpartition(".")[2]


def _block(site: str) -> str:
    return site.rpartition(".")[0]
