"""Bundles with slots, of the real MiniLM: what is in one, what it answers, what it refuses, and what verify sees."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.bundle.bundle import sha256_file, write_manifest
from deployfa.bundle.open_engine import open_slots
from deployfa.bundle.slots import idle_row, slots_of
from deployfa.convert import to_lora
from deployfa.data import Row
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import (
    AdapterFormatError,
    BaseMismatchError,
    BundleError,
    EditError,
    InputError,
    LeftoverError,
    SiteError,
)
from deployfa.graph.storage import load_graph, save_graph
from deployfa.parity import verify
from deployfa.parity.cases import read_cases
from deployfa.parity.measures import LIMIT, normwise
from deployfa.parity.slots import run_slots
from deployfa.parity.truth import run_graph
from deployfa.pipeline import export, fused_base
from deployfa.predict import Predictor
from deployfa.preprocess.sentences import SENTENCES
from deployfa.runtimes.onnx_adapter import read_onnx_adapter, write_onnx_adapter
from deployfa.slots import export_slots, other_in_slots, slot_adapter, slot_row, write_slot
from deployfa.unfused import unfused

#: Enough that the ratio of two noises settles; all of them take 10 s longer a bundle.
ROWS = [Row(text=text) for text in SENTENCES[:40]]
TEXTS = ["A joy from start to finish.", "It broke after 3 days.", "ok"]


@pytest.fixture(scope="module")
def made(slot_bundles: dict[str, Path]) -> dict[str, Path]:
    return slot_bundles


def edited(adapter: Adapter, seed: int, *, labels: int = 2) -> Adapter:
    """Other numbers in the same edits, and a head of so many labels."""
    random = np.random.default_rng(seed)
    edits = {
        site: Edit(lam=(0.05 * random.standard_normal(edit.in_features or 0)).astype(np.float32))
        for site, edit in adapter.edits.items()
    }
    head = {
        "weight": random.standard_normal((labels, 384)).astype(np.float32),
        "bias": random.standard_normal(labels).astype(np.float32),
    }
    names = tuple(f"label {number}" for number in range(labels))
    return dataclasses.replace(adapter, edits=edits, modules={"classifier": head}, labels=names)


@pytest.fixture(scope="module")
def vefa(trained: dict[str, Path]) -> Adapter:
    return Adapter.load(trained["vefa"])


@pytest.mark.parametrize("name", ["vefa", "lora", "plain"])
def test_a_bundle_holds_what_a_swap_needs(made: dict[str, Path], trained: dict[str, Path], name: str) -> None:
    bundle = Bundle.open(made[name])
    slots = slots_of(bundle)
    assert {slots.file, slots.idle.file, "adapter.safetensors"} <= set(bundle.manifest.files)
    assert slots.idle_branch == (name != "plain")
    assert bundle.labels == ["negative", "positive"]
    # transformers' fusions leave shapes that the full check of the base graph alone complains about too
    onnx.checker.check_model(str(bundle.graph), full_check=name == "lora")
    own = Adapter.load(trained["vefa" if name == "plain" else name])
    row = slot_row(bundle, own)
    stored = read_onnx_adapter(bundle.path / slots.file, slots.layout, idle_branch=slots.idle_branch)
    assert all(np.array_equal(row[tensor], stored[tensor]) for tensor in row)
    inputs = [tensor.name for tensor in bundle.manifest.graph.inputs]
    assert inputs[:3] == ["input_ids", "attention_mask", "token_type_ids"]
    assert set(inputs[3:]) == {
        *row,
        "adapter_strength",
        "adapter_labels",
        *(["adapter_active"] if slots.idle_branch else []),
    }


@pytest.mark.parametrize("name", ["vefa", "lora", "plain"])
def test_a_graph_for_another_runtime_takes_no_names_of_labels(made: dict[str, Path], name: str) -> None:
    """An input that nothing reads would want a size in every engine."""
    bundle = Bundle.open(made[name])
    assert "adapter_labels" in {tensor.name for tensor in bundle.manifest.graph.inputs}
    plain = unfused(bundle)
    inputs = {value.name for value in plain.model.graph.inputs}
    assert {"adapter_strength", *slots_of(bundle).layout.shapes()} <= inputs
    assert "adapter_labels" not in inputs | plain.defaults.keys()


def test_the_two_branches_share_their_weights_on_disk(made: dict[str, Path], bundles: dict[str, Path]) -> None:
    """Unfused they are the same; the packed queries, keys and values of a fusion are the base's alone."""
    one = Bundle.open(bundles["folded"]).manifest.graph.bytes
    packed = 6 * 4 * (3 * 384 * 384 + 3 * 384)
    assert Bundle.open(made["lora"]).manifest.graph.bytes < 1.02 * one
    assert Bundle.open(made["vefa"]).manifest.graph.bytes < 1.02 * one + packed


@pytest.mark.parametrize("name", ["vefa", "lora"])
def test_idle_is_the_base_graph_of_that_fusion_bit_for_bit(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Against a base graph fused here and now, with the base's own head."""
    from deployfa.base_graphs import base_graph
    from deployfa.graph.optimize import fuse

    bundle = Bundle.open(made[name])
    assert slots_of(bundle).exact
    base = base_graph(Adapter.load(bundle.adapter))
    path = save_graph(fuse(base.load(), bundle.manifest.optimization.chosen), tmp_path)
    cases = read_cases(bundle.path / slots_of(bundle).idle.file)
    runner = open_slots(bundle, spinning=False)
    for found, wanted in zip(run_slots(runner, cases, None), run_graph(path, cases), strict=True):
        assert found.tobytes() == wanted.tobytes()
    # what bench compares with has the adapter's head, and so other answers of the same cost
    assert fused_base(bundle, _folder(tmp_path / "headed")).is_file()


def test_a_b_a_is_a_and_equals_the_folded_bundle(
    made: dict[str, Path], bundles: dict[str, Path], vefa: Adapter, tmp_path: Path
) -> None:
    bundle, folded = Bundle.open(made["vefa"]), Bundle.open(bundles["folded"])
    runner = open_slots(bundle, spinning=False)
    cases = read_cases(bundle.reference)
    other = edited(vefa, 1)
    write_slot(bundle, other, tmp_path / "b.onnx_adapter")
    own, swapped = runner.current, slot_adapter(bundle, runner, tmp_path / "b.onnx_adapter")
    first = run_slots(runner, cases, own)
    between = run_slots(runner, cases, swapped)
    again = run_slots(runner, cases, own)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.allclose(a, b, rtol=0.01) for a, b in zip(first, between, strict=True))
    noise = bundle.manifest.reference.noise
    assert normwise(np.concatenate(first), np.concatenate(run_graph(folded.graph, cases))) <= LIMIT * noise
    # the other one too, exported by itself
    done = export(other, tmp_path / "other", optimize="ort", rows=ROWS)
    alone = np.concatenate(run_graph(done.bundle.graph, cases))
    assert normwise(np.concatenate(between), alone) <= LIMIT * done.bundle.manifest.reference.noise


def test_a_file_and_the_row_fed_are_the_same_bits(made: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
    for name in ("vefa", "plain"):
        bundle = Bundle.open(made[name])
        runner = open_slots(bundle, spinning=False)
        cases = read_cases(bundle.reference)
        path = tmp_path / f"{name}.onnx_adapter"
        write_slot(bundle, edited(vefa, 3, labels=3), path)
        vefa.save(tmp_path / f"{name}.safetensors")
        edited(vefa, 3, labels=3).save(tmp_path / f"{name}-b.safetensors")
        by_file = slot_adapter(bundle, runner, path)
        by_feeds = slot_adapter(bundle, runner, tmp_path / f"{name}-b.safetensors")
        names = [spec.name for spec in runner.inputs]
        for case in cases:
            feeds = {each: case.feeds[each] for each in names}
            one, other = (runner.run(feeds, each)["logits"] for each in (by_file, by_feeds))
            assert np.array_equal(one, other)
            assert np.isneginf(one[:, 3:]).all() and np.isfinite(one[:, :3]).all()


def test_a_lorfa_in_slots_on_the_output_is_the_lorfa(
    made: dict[str, Path], trained: dict[str, Path], tmp_path: Path
) -> None:
    """The slots of a LoRA lie on the output; a LoRFA is put there as the LoRA that equals it, with the base's W."""
    bundle, lorfa = Bundle.open(made["lora"]), Adapter.load(trained["lorfa"])
    row, equal = slot_row(bundle, lorfa), slot_row(bundle, to_lora(lorfa))
    for tensor, array in row.items():
        # W B is rounded before it is multiplied with s in the one, and after it in the other
        assert np.allclose(array, equal[tensor], rtol=2 * np.finfo(np.float32).eps, atol=0)
    runner = open_slots(bundle, spinning=False)
    done = export(lorfa, tmp_path / "lorfa", optimize="none", rows=ROWS)
    cases = read_cases(done.bundle.reference)
    found, folded = run_slots(runner, cases, runner.load(row)), run_graph(done.bundle.graph, cases)
    # each may be LIMIT from the truth
    limit = 2 * LIMIT * done.bundle.manifest.reference.noise
    assert normwise(np.concatenate(found), np.concatenate(folded)) <= limit


@pytest.mark.parametrize("name", ["vefa", "lora", "plain"])
def test_verify_passes_active_and_idle(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    bundle = Bundle.open(_copied(made[name], tmp_path))
    report = verify(bundle, use_torch=False)
    assert report.passed, report.reason
    assert [stage.name for stage in report.stages] == [
        "no adapter, as deployed",
        "ONNX Runtime, optimisations off",
        "ONNX Runtime, as deployed",
    ]
    assert report.stages[0].effect_error is None and report.stages[2].effect_error is not None


@pytest.mark.slow
def test_verify_against_pytorch(made: dict[str, Path], minilm_dir: Path) -> None:
    """With more labels' room than the adapter has, and the base with its own head."""
    report = verify(Bundle.open(made["vefa"]), rows=ROWS, model=minilm_dir, use_torch=True)
    assert report.passed, report.reason
    assert "PyTorch" in report.truth
    assert [stage.name for stage in report.stages][:2] == ["no adapter, as deployed", "PyTorch float32"]


def two_sites_swapped(bundle: Bundle, row: Mapping[str, Array]) -> dict[str, Array]:
    """λ of the first two sites of one width, each where the other's belongs."""
    segments = slots_of(bundle).layout.vectors[0].segments
    one, other = segments[4], segments[6]
    assert one.stop - one.start == other.stop - other.start
    lam = row["adapter/lambda"]
    swapped = lam.copy()
    swapped[one.start : one.stop], swapped[other.start : other.stop] = (
        lam[other.start : other.stop],
        lam[one.start : one.stop],
    )
    return {**row, "adapter/lambda": swapped}


def swap_two_sites(bundle: Bundle) -> None:
    """In the adapter's own file; every checksum right."""
    slots = slots_of(bundle)
    file = bundle.path / slots.file
    row = two_sites_swapped(bundle, read_onnx_adapter(file, slots.layout, idle_branch=slots.idle_branch))
    write_onnx_adapter(file, row, slots.layout, idle_branch=slots.idle_branch, force=True)


def _graph_changed(change: Callable[[ir.Model], None]) -> Callable[[Bundle], None]:
    def corrupt(bundle: Bundle) -> None:
        model = load_graph(bundle.graph)
        for graph in model.graphs():
            for value in graph.initializers.values():
                assert value.const_value is not None
                value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
        change(model)
        save_graph(model, bundle.path, share_equal=True)

    return corrupt


def _branch(model: ir.Model, name: str) -> ir.Graph:
    return next(node for node in model.graph if node.op_type == "If").attributes[name].as_graph()


def _nudge(graph: ir.Graph) -> None:
    """One weight of a layer a little larger."""
    value = next(v for v in graph.initializers.values() if v.shape is not None and list(v.shape) == [1536, 384])
    assert value.const_value is not None
    array = np.array(value.const_value.numpy())
    array[5] *= 1.01
    value.const_value = ir.tensor(array, name=value.name)


@_graph_changed
def nudge_the_idle_branch(model: ir.Model) -> None:
    _nudge(_branch(model, "else_branch"))


@_graph_changed
def nudge_the_adapted_branch(model: ir.Model) -> None:
    _nudge(_branch(model, "then_branch"))


@_graph_changed
def drop_the_switch(model: ir.Model) -> None:
    """``adapter_active`` is taken and not heeded: the adapter's answers are the base's."""
    cast = next(node for node in model.graph if node.op_type == "Cast")
    never = ir.node("Sub", [cast.inputs[0], cast.inputs[0]], name="never")  # type: ignore[list-item]
    never.outputs[0].name, never.outputs[0].type = "never", cast.inputs[0].type  # type: ignore[union-attr]
    model.graph.insert_before(cast, never)
    cast.replace_input_with(0, never.outputs[0])


@_graph_changed
def always_switched_on(model: ir.Model) -> None:
    """Idle runs the slots with the identity in them: within the noise, and not the base graph."""
    cast = next(node for node in model.graph if node.op_type == "Cast")
    on = ir.node("Exp", [cast.inputs[0]], name="always")  # type: ignore[list-item]
    on.outputs[0].name, on.outputs[0].type = "always", cast.inputs[0].type  # type: ignore[union-attr]
    model.graph.insert_before(cast, on)
    cast.replace_input_with(0, on.outputs[0])


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (swap_two_sites, "ONNX Runtime, optimisations off: "),
        (nudge_the_idle_branch, "no adapter, as deployed: "),
        (nudge_the_adapted_branch, "ONNX Runtime, optimisations off: "),
        (drop_the_switch, "ONNX Runtime, optimisations off: "),
        (always_switched_on, "no adapter, as deployed: the answers are not those of the base graph in it, bit for bit"),
    ],
)
def test_verify_sees_a_fault(
    made: dict[str, Path], tmp_path: Path, fault: Callable[[Bundle], None], stage: str
) -> None:
    bundle = Bundle.open(_copied(made["vefa"], tmp_path))
    fault(bundle)
    report = verify(_vouched(bundle), use_torch=False)
    assert not report.passed
    assert report.reason.startswith(stage)


@pytest.mark.slow
class TestAnotherAdapterVerified:
    """In the slots of a bundle that brings one of its own, against PyTorch in float64."""

    @pytest.mark.parametrize("file", ["x.onnx_adapter", "x.safetensors"])
    def test_with_labels_of_its_own(self, made: dict[str, Path], vefa: Adapter, tmp_path: Path, file: str) -> None:
        bundle, other = Bundle.open(made["vefa"]), edited(vefa, 7, labels=3)
        if file.endswith(".onnx_adapter"):
            write_slot(bundle, other, tmp_path / file)
        else:
            other.save(tmp_path / file)
        report = verify(bundle, rows=ROWS, other=other_in_slots(bundle, tmp_path / file))
        assert report.passed, report.reason
        assert report.adapter == str(tmp_path / file) and "PyTorch" in report.truth
        assert [stage.name for stage in report.stages] == [
            "PyTorch float32",
            "ONNX Runtime, optimisations off",
            "ONNX Runtime, as deployed",
        ]
        assert report.effect > 0.01

    def test_with_the_bases_head(self, made: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
        bundle = Bundle.open(made["plain"])
        dataclasses.replace(edited(vefa, 8), modules={}, labels=()).save(tmp_path / "bare.safetensors")
        report = verify(bundle, rows=ROWS, other=other_in_slots(bundle, tmp_path / "bare.safetensors"))
        assert report.passed, report.reason

    def test_a_lorfa_in_slots_of_a_lora(self, made: dict[str, Path], trained: dict[str, Path], tmp_path: Path) -> None:
        """Drawn: a few steps of training leave one that answers nearly the same to all, PyTorch within a last bit."""
        bundle, lorfa = Bundle.open(made["lora"]), Adapter.load(trained["lorfa"])
        random = np.random.default_rng(1)
        edits = {}
        for site, edit in lorfa.edits.items():
            k = edit.in_features or 0
            a, b = random.standard_normal((8, k)) / k**0.5, 0.05 * random.standard_normal((k, 8))
            edits[site] = Edit(input_low_rank=LowRank(a.astype(np.float32), b.astype(np.float32), 1.0))
        dataclasses.replace(lorfa, edits=edits).save(tmp_path / "x.safetensors")
        report = verify(bundle, rows=ROWS, other=other_in_slots(bundle, tmp_path / "x.safetensors"))
        assert report.passed, report.reason

    def test_accuracy_is_counted_in_its_labels(self, made: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
        bundle = Bundle.open(made["vefa"])
        edited(vefa, 7, labels=3).save(tmp_path / "x.safetensors")
        rows = [Row(text=row.text, label=f"label {number % 3}") for number, row in enumerate(ROWS)]
        report = verify(bundle, rows=rows, other=other_in_slots(bundle, tmp_path / "x.safetensors"))
        assert report.passed and report.truth_accuracy is not None

    def test_numbers_that_are_not_the_adapters_are_seen(
        self, made: dict[str, Path], vefa: Adapter, tmp_path: Path
    ) -> None:
        bundle = Bundle.open(made["vefa"])
        edited(vefa, 7).save(tmp_path / "x.safetensors")
        other = other_in_slots(bundle, tmp_path / "x.safetensors")
        assert isinstance(other.slot, dict)
        wrong = dataclasses.replace(other, slot=two_sites_swapped(bundle, other.slot))
        report = verify(bundle, rows=ROWS, other=wrong)
        assert not report.passed and report.reason.startswith("ONNX Runtime, optimisations off: ")

    def test_a_fault_of_the_graph_is_seen_with_a_file(
        self, made: dict[str, Path], vefa: Adapter, tmp_path: Path
    ) -> None:
        bundle = Bundle.open(_copied(made["vefa"], tmp_path))
        write_slot(bundle, edited(vefa, 7), tmp_path / "x.onnx_adapter")
        nudge_the_adapted_branch(bundle)
        bundle = _vouched(bundle)
        report = verify(bundle, rows=ROWS, other=other_in_slots(bundle, tmp_path / "x.onnx_adapter"))
        assert not report.passed and report.reason.startswith("ONNX Runtime, optimisations off: ")


def test_without_pytorch_nothing_is_known_of_another(made: dict[str, Path], trained: dict[str, Path]) -> None:
    bundle = Bundle.open(made["vefa"])
    other = other_in_slots(bundle, trained["vefa"])
    with pytest.raises(InputError, match="leave --no-torch out, or leave --adapter out to compare with the stored"):
        verify(bundle, other=other, use_torch=False)
    with pytest.raises(InputError, match="only with --patch, or for a bundle with slots or a pack"):
        verify(bundle, adapter=Adapter.load(trained["vefa"]))


def test_an_adapter_without_its_switch_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    bundle = Bundle.open(_copied(made["vefa"], tmp_path))
    slots = slots_of(bundle)
    row = read_onnx_adapter(bundle.path / slots.file, slots.layout, idle_branch=True)
    write_onnx_adapter(bundle.path / slots.file, row, slots.layout, idle_branch=False, force=True)
    with pytest.raises(AdapterFormatError, match="does not switch itself on"):
        verify(_vouched(bundle), use_torch=False)


def test_a_bundle_vouches_for_its_slots_files(made: dict[str, Path], tmp_path: Path) -> None:
    bundle = Bundle.open(_copied(made["vefa"], tmp_path))
    file = bundle.path / slots_of(bundle).file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(bundle.path)
    for name in (slots_of(bundle).file, slots_of(bundle).idle.file):
        files = {key: value for key, value in bundle.manifest.files.items() if key != name}
        write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, files=files))
        with pytest.raises(BundleError, match="vouches for no"):
            Bundle.open(bundle.path)


class TestPredictor:
    def test_its_own_adapter_answers_by_default(self, made: dict[str, Path], bundles: dict[str, Path]) -> None:
        found = list(Predictor(Bundle.open(made["vefa"])).answer(TEXTS))
        wanted = list(Predictor(Bundle.open(bundles["folded"])).answer(TEXTS))
        assert [answer.label for answer in found] == [answer.label for answer in wanted]
        assert np.allclose([a.score for a in found], [a.score for a in wanted], atol=1e-5)
        assert all(set(answer.scores) == {"negative", "positive"} for answer in found)

    def test_another_by_name_and_by_swap(self, made: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
        bundle = Bundle.open(made["vefa"])
        predictor = Predictor(bundle)
        assert predictor.slots is not None
        edited(vefa, 5, labels=3).save(tmp_path / "b.safetensors")
        write_slot(bundle, edited(vefa, 5, labels=3), tmp_path / "b.onnx_adapter")
        own = [answer.scores for answer in predictor.answer(TEXTS)]
        named = slot_adapter(bundle, predictor.slots, tmp_path / "b.safetensors")
        found = [answer.scores for answer in predictor.answer(TEXTS, slot=named)]
        assert all(list(scores) == ["label 0", "label 1", "label 2"] for scores in found)
        assert [answer.scores for answer in predictor.answer(TEXTS)] == own
        predictor.slots.swap(slot_adapter(bundle, predictor.slots, tmp_path / "b.onnx_adapter"))
        assert [answer.scores for answer in predictor.answer(TEXTS)] == found, "the file brings its labels along"

    def test_a_file_without_names_and_one_with_too_many(
        self, made: dict[str, Path], vefa: Adapter, tmp_path: Path
    ) -> None:
        bundle = Bundle.open(made["vefa"])
        predictor, path = Predictor(bundle), tmp_path / "b.onnx_adapter"
        assert predictor.slots is not None
        write_slot(bundle, dataclasses.replace(edited(vefa, 5, labels=3), labels=()), path)
        unnamed = slot_adapter(bundle, predictor.slots, path)
        wanted = {"LABEL_0", "LABEL_1", "LABEL_2"}
        assert all(set(answer.scores) == wanted for answer in predictor.answer(TEXTS, slot=unnamed))
        write_slot(bundle, dataclasses.replace(edited(vefa, 5, labels=3), labels=tuple("abcd")), path, force=True)
        many = slot_adapter(bundle, predictor.slots, path)
        with pytest.raises(BundleError, match="the adapter names 4 labels for 3 outputs; convert it again"):
            list(predictor.answer(TEXTS, slot=many))

    def test_a_bundle_that_takes_no_names(self, made: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
        """As bundles were before names were an input: the runtime would refuse a file with them."""
        bundle = Bundle.open(made["vefa"])
        graph = bundle.manifest.graph
        inputs = [tensor for tensor in graph.inputs if tensor.name != "adapter_labels"]
        bundle.manifest = msgspec.structs.replace(bundle.manifest, graph=msgspec.structs.replace(graph, inputs=inputs))
        write_slot(bundle, edited(vefa, 5, labels=3), tmp_path / "b.onnx_adapter")
        assert slot_adapter(bundle, open_slots(bundle), tmp_path / "b.onnx_adapter").labels == ()

    def test_labels_of_a_file_with_a_head_that_is_known(
        self, made: dict[str, Path], vefa: Adapter, tmp_path: Path
    ) -> None:
        bundle = Bundle.open(made["vefa"])
        runner = open_slots(bundle)
        write_slot(bundle, dataclasses.replace(vefa, edits=edited(vefa, 6).edits), tmp_path / "own.onnx_adapter")
        assert slot_adapter(bundle, runner, tmp_path / "own.onnx_adapter").labels == ("negative", "positive")
        bare = dataclasses.replace(vefa, modules={}, labels=())
        write_slot(bundle, bare, tmp_path / "bare.onnx_adapter")
        assert slot_adapter(bundle, runner, tmp_path / "bare.onnx_adapter").labels == tuple(slots_of(bundle).labels)

    def test_the_base_without_an_adapter(self, made: dict[str, Path]) -> None:
        bundle = Bundle.open(made["vefa"])
        predictor = Predictor(bundle)
        idle = list(predictor.answer(TEXTS, slot=None))
        assert idle != list(predictor.answer(TEXTS))
        assert all(list(answer.scores) == slots_of(bundle).labels for answer in idle)

    def test_strength(self, made: dict[str, Path], bundles: dict[str, Path]) -> None:
        predictor = Predictor(Bundle.open(made["plain"]))
        assert np.array_equal(predictor.logits(TEXTS, strength=1.0), predictor.logits(TEXTS))
        assert not np.allclose(predictor.logits(TEXTS, strength=0.5)[:, :2], predictor.logits(TEXTS)[:, :2])
        with pytest.raises(InputError, match="not between 0, the base, and 1"):
            predictor.logits(TEXTS, strength=2.0)
        folded = Predictor(Bundle.open(bundles["folded"]))
        assert folded.slots is None
        with pytest.raises(InputError, match="leave --adapter and --strength out"):
            folded.logits(TEXTS, strength=0.5)
        with pytest.raises(InputError, match="no slots for another adapter; export it with --slots"):
            folded.logits(TEXTS, slot=predictor.slots.current if predictor.slots is not None else None)


class TestWhatDoesNotFit:
    def test_another_base(self, made: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
        bundle = Bundle.open(made["vefa"])
        other = dataclasses.replace(vefa, base=msgspec.structs.replace(vefa.base, fingerprint="sha256:feed" + "0" * 60))
        with pytest.raises(BaseMismatchError, match=r"the bundle is for base .*; export an adapter of that base"):
            write_slot(bundle, other, tmp_path / "x.onnx_adapter")
        assert list(tmp_path.iterdir()) == []
        assert slot_row(bundle, other, allow_base_mismatch=True).keys() == idle_row(bundle).keys()

    def test_a_site_or_part_without_a_slot(
        self, made: dict[str, Path], vefa: Adapter, trained: dict[str, Path]
    ) -> None:
        bundle = Bundle.open(made["vefa"])
        site = next(iter(vefa.edits))
        other = dataclasses.replace(vefa, edits={**vefa.edits, "bert.pooler.dense": vefa.edits[site]})
        with pytest.raises(SiteError, match=r"site 'bert\.pooler\.dense' not found; sites in this graph: bert\."):
            slot_row(bundle, other)
        with pytest.raises(
            SiteError, match="no place for 'A' here, only for: lambda; export this adapter with --slots"
        ):
            slot_row(bundle, Adapter.load(trained["lorfa"]))

    def test_a_rank_or_labels_beyond_the_room(
        self, made: dict[str, Path], vefa: Adapter, trained: dict[str, Path]
    ) -> None:
        with pytest.raises(
            EditError, match="5 labels, the bundle has room for 4; export the bundle again with --slots --max-labels 5"
        ):
            slot_row(Bundle.open(made["vefa"]), edited(vefa, 1, labels=5))
        lora = Adapter.load(trained["lora"])
        site, edit = next(iter(lora.edits.items()))
        low = edit.output_low_rank
        assert low is not None
        wide = LowRank(np.tile(low.a, (2, 1)), np.tile(low.b, (1, 2)), low.s)
        with pytest.raises(EditError, match=r"rank 16, the bundle has room for 8; export .* --slots --max-rank 16"):
            slot_row(
                Bundle.open(made["lora"]),
                dataclasses.replace(lora, edits={**lora.edits, site: Edit(output_low_rank=wide)}),
            )

    def test_a_bundle_without_slots(self, bundles: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="has no slots for another adapter; export it with --slots"):
            write_slot(Bundle.open(bundles["folded"]), vefa, tmp_path / "x.onnx_adapter")

    def test_a_file_of_another_bundle(self, made: dict[str, Path], vefa: Adapter, tmp_path: Path) -> None:
        write_slot(Bundle.open(made["plain"]), vefa, tmp_path / "x.onnx_adapter")
        bundle = Bundle.open(made["vefa"])
        with pytest.raises(BaseMismatchError, match="was made for another bundle"):
            slot_adapter(bundle, open_slots(bundle), tmp_path / "x.onnx_adapter")


def test_room_is_in_the_layout(made: dict[str, Path]) -> None:
    assert slots_of(Bundle.open(made["vefa"])).layout.heads[0].out_features == 4
    assert slots_of(Bundle.open(made["plain"])).layout.heads[0].out_features == 3
    assert {low.rank for low in slots_of(Bundle.open(made["lora"])).layout.low_ranks} == {8}


def test_a_trained_adapter_that_changes_nothing_is_an_error(vefa: Adapter, tmp_path: Path) -> None:
    edits = {site: Edit(lam=np.full(len(edit.lam), 1e-12, np.float32)) for site, edit in vefa.edits.items()}  # type: ignore[arg-type]
    with pytest.raises(LeftoverError, match="nothing was written"):
        export_slots(dataclasses.replace(vefa, edits=edits), tmp_path / "out", optimize="none", rows=ROWS[:4])
    assert list(tmp_path.iterdir()) == []


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder / "copy"))


def _vouched(bundle: Bundle) -> Bundle:
    """The bundle with a manifest that vouches for what is there now: only parity can tell."""
    files = {name: sha256_file(bundle.path / name) for name in bundle.manifest.files}
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, files=files))
    return Bundle.open(bundle.path)
