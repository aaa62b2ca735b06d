"""Patches: what they hold, that a patched session is the full graph bit for bit, and what cannot be one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from deployfa import VeFAConfig, capture
from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.delta import Delta, export_delta
from deployfa.edits import Array
from deployfa.errors import (
    BaseMismatchError,
    InputError,
    LeftoverError,
    OutputExistsError,
    PlanError,
    RuntimeTargetError,
)
from deployfa.graph.storage import load_graph
from deployfa.parity import verify
from deployfa.parity.measures import LIMIT
from deployfa.pipeline import export
from deployfa.predict import Predictor

TEXTS = ["a joy from start to finish", "a bore", "", "neither good nor bad, but long " * 5]


@pytest.fixture(scope="module")
def adapters(trained: dict[str, Path]) -> dict[str, Adapter]:
    return {name: Adapter.load(path) for name, path in trained.items()}


@pytest.fixture(scope="module")
def deltas(adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Delta]:
    """MiniLM, packed Q/K/V: the bundle written with ``vefa``, then two more patches for it."""
    folder = tmp_path_factory.mktemp("fleet")
    return {
        name: export_delta(
            adapters[name],
            folder / "fleet.bundle",
            folder / f"{name}.patch",
            optimize="ort" if name == "vefa" else "auto",
        )
        for name in ("vefa", "lorfa", "head")
    }


def graph_tensors(bundle: Path) -> dict[str, Array]:
    initializers = load_graph(bundle / "model.onnx").graph.initializers
    return {name: value.const_value.numpy() for name, value in initializers.items()}


def logits(bundle: Bundle) -> Array:
    return Predictor(bundle, threads=1).logits(TEXTS)


def test_the_bundle_is_written_once_and_is_the_base(deltas, adapters) -> None:
    assert [delta.wrote_bundle for delta in deltas.values()] == [True, False, False]
    fleet = Bundle.open(deltas["vefa"].bundle.path)
    assert fleet.patch is None
    assert (fleet.manifest.adapter.sites, fleet.manifest.plan["edits"]) == (0, [])
    assert Adapter.load(fleet.adapter).edits == {}
    assert fleet.manifest.optimization.chosen == "ort"
    assert all(count.adapted == count.base for count in fleet.manifest.fusions.values())
    report = verify(fleet, use_torch=True)
    assert report.passed, report.reason


def test_the_bundle_answers_bit_for_bit_as_a_full_export_of_the_base(deltas, adapters, tmp_path: Path) -> None:
    plain = dataclasses.replace(adapters["vefa"], edits={})
    full = export(plain, tmp_path / "plain", optimize="ort").bundle
    np.testing.assert_array_equal(logits(Bundle.open(deltas["vefa"].bundle.path)), logits(full))


@pytest.mark.parametrize("name", ["vefa", "lorfa"])
def test_a_patch_is_what_a_full_export_differs_in_and_answers_bit_for_bit_the_same(
    deltas, adapters, tmp_path: Path, name: str
) -> None:
    """The tensors against the two graphs on disk: their names are alike, because they went through the same steps."""
    full = export(adapters[name], tmp_path / name, optimize="ort").bundle
    found = logits(Bundle.open(deltas[name].bundle.path, patch=deltas[name].patch.path))
    np.testing.assert_array_equal(found, logits(full))
    assert not np.array_equal(found, logits(Bundle.open(deltas[name].bundle.path)))
    fleet, other = graph_tensors(deltas[name].bundle.path), graph_tensors(full.path)
    assert fleet.keys() == other.keys()
    differing = {key for key in fleet if fleet[key].tobytes() != other[key].tobytes()}
    tensors = deltas[name].patch.tensors
    assert tensors.keys() == differing
    for key in differing:
        np.testing.assert_array_equal(tensors[key], other[key])


def test_on_a_post_norm_model_the_patch_is_large_and_says_so(deltas) -> None:
    """BERT's norms also feed the residual, so every edit changes a whole weight."""
    delta = deltas["vefa"]
    assert delta.plan.count("own weight") == 36
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert delta.patch.tensor_bytes == 4 * weights
    assert delta.share == pytest.approx(4 * weights / delta.bundle.manifest.graph.bytes)
    assert 0.4 < delta.share < 0.5


def test_what_was_measured_is_in_the_patch(deltas, adapters) -> None:
    for name, delta in deltas.items():
        meta = delta.patch.meta
        assert 0 < meta.error <= LIMIT * meta.noise
        assert meta.adapter.method == adapters[name].method
        assert len(meta.plan["edits"]) == len(adapters[name].edits)
        assert meta.labels == ["negative", "positive"]
        assert meta.base.fingerprint == adapters[name].base.fingerprint


@pytest.mark.parametrize("with_torch", [False, True])
def test_a_patch_is_verified(deltas, adapters, with_torch: bool) -> None:
    report = verify(deltas["lorfa"].bundle, adapter=adapters["lorfa"] if with_torch else None)
    assert report.passed, report.reason
    assert report.patch == str(deltas["lorfa"].patch.path)
    assert ("PyTorch" in report.truth) is with_torch


def test_the_wrong_patch_is_seen_by_verify(deltas, adapters) -> None:
    """One tensor less than the adapter changes; and another adapter's truth."""
    delta = deltas["lorfa"]
    first = next(iter(delta.patch.tensors))
    less = {name: array for name, array in delta.patch.tensors.items() if name != first}
    wrong = Bundle(delta.bundle.path, delta.bundle.manifest, dataclasses.replace(delta.patch, tensors=less))
    assert not verify(wrong).passed
    assert not verify(delta.bundle, adapter=adapters["vefa"]).passed


def test_verify_says_what_it_needs(deltas, adapters) -> None:
    with pytest.raises(InputError, match="pass --adapter FILE, or --no-torch"):
        verify(deltas["vefa"].bundle, use_torch=True)
    with pytest.raises(InputError, match="only with --patch"):
        verify(Bundle.open(deltas["vefa"].bundle.path), adapter=adapters["vefa"])


def test_a_session_that_answers_otherwise_is_not_shipped(deltas, adapters, tmp_path: Path, monkeypatch) -> None:
    """The check at export, with one bit of one tensor lost on the way."""
    import deployfa.delta

    real = deployfa.delta.changed_tensors

    def lossy(graph, other):
        found = real(graph, other)
        name = max(found, key=lambda each: found[each].size)
        return {**found, name: np.nextafter(found[name], np.float32(np.inf), dtype=np.float32)}

    monkeypatch.setattr(deployfa.delta, "changed_tensors", lossy)
    with pytest.raises(RuntimeTargetError, match="bit for bit"):
        export_delta(adapters["lorfa"], deltas["vefa"].bundle.path, tmp_path / "x.patch")
    assert list(tmp_path.iterdir()) == []


class TestRefusals:
    @pytest.fixture
    def fleet(self, deltas) -> Path:
        return deltas["vefa"].bundle.path

    def test_a_side_op_is_named_before_anything_is_written(self, adapters, tmp_path: Path) -> None:
        with pytest.raises(
            PlanError, match=r"site 'bert\.encoder.*' needs a side op \(asked for with .*without --delta"
        ):
            export_delta(adapters["vefa"], tmp_path / "f", tmp_path / "p", placement="side-op")
        assert list(tmp_path.iterdir()) == []

    def test_another_number_of_labels_is_another_graph(self, adapters, fleet: Path, tmp_path: Path) -> None:
        ((path, head),) = adapters["vefa"].modules.items()
        wide = {name: np.concatenate([array, array[:1]]) for name, array in head.items()}
        three = dataclasses.replace(adapters["vefa"], modules={path: wide}, labels=("a", "b", "c"))
        with pytest.raises(
            PlanError, match=rf"module '{path}' \(replaced\).*\[3, 384\] and no longer.*ANOTHER\.bundle"
        ):
            export_delta(three, fleet, tmp_path / "p")

    def test_a_bundle_of_another_base_is_refused(self, adapters, fleet: Path, tmp_path: Path) -> None:
        import msgspec

        copy = Path(shutil.copytree(fleet, tmp_path / "copy"))
        manifest = msgspec.json.decode((copy / "manifest.json").read_bytes())
        manifest["base"]["fingerprint"] = "sha256:0"
        (copy / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        with pytest.raises(BaseMismatchError, match="another base model"):
            export_delta(adapters["lora"], copy, tmp_path / "p")

    def test_another_fusion_than_the_bundles_is_refused(self, adapters, fleet: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="has the fusion 'ort'"):
            export_delta(adapters["lora"], fleet, tmp_path / "p", optimize="none")

    def test_an_adapter_that_is_the_bundle_has_nothing_to_ship(self, adapters, fleet: Path, tmp_path: Path) -> None:
        with pytest.raises(LeftoverError, match="nothing to ship"):
            export_delta(dataclasses.replace(adapters["vefa"], edits={}), fleet, tmp_path / "p")

    def test_a_patch_that_exists_is_kept_without_force(self, adapters, deltas, fleet: Path, tmp_path: Path) -> None:
        out = tmp_path / "p.patch"
        out.write_text("mine")
        with pytest.raises(OutputExistsError, match="--force"):
            export_delta(adapters["lora"], fleet, out)
        assert out.read_text() == "mine"
        export_delta(adapters["head"], fleet, out, force=True)
        assert out.read_bytes() == deltas["head"].patch.path.read_bytes(), "the same patch, the same bytes"


#: name → (class, config, sites, norms that the sites read)
PRE_NORM = {
    "gpt2": (
        tf.GPT2ForSequenceClassification,
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
        tf.GPT2Config,
        ["c_attn", "c_fc"],
        # γ and β of two norms a layer
        2 * 2 * 2,
    ),
    "llama": (
        tf.LlamaForSequenceClassification,
        {
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64,
        },
        tf.LlamaConfig,
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        # γ alone
        2 * 2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=PRE_NORM)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str, minilm_dir: Path, tmp_path_factory) -> Path:
    cls, sizes, config, _, _ = PRE_NORM[kind]
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_dir)
    torch.manual_seed(0)
    model = cls(config(vocab_size=tokenizer.vocab_size, num_labels=2, pad_token_id=0, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith(("ln_1.bias", "ln_2.bias")):
            torch.nn.init.normal_(parameter, std=0.1)  # a β of zeros stays what it is under any λ
    folder = tmp_path_factory.mktemp(kind) / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pre_norm_adapter(kind: str, model: Path, seed: int, **options) -> Adapter:
    sites = options.pop("sites", PRE_NORM[kind][3])
    base = tf.AutoModelForSequenceClassification.from_pretrained(model)
    config = VeFAConfig(target_modules=sites, modules_to_save=["score"], share_input=True, **options)
    adapted = peft.get_peft_model(base, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return capture(adapted, base_name=str(model), labels=["no", "yes"])


@pytest.fixture(scope="module", params=["none", "ort", "onnxscript"])
def fleet(request, kind: str, model: Path, tmp_path_factory) -> tuple[Path, Delta, Delta]:
    folder = tmp_path_factory.mktemp("fleet")
    first, second = (
        export_delta(
            pre_norm_adapter(kind, model, seed),
            folder / "fleet.bundle",
            folder / f"{seed}.patch",
            optimize=request.param,
            prefer="smallest-patch",
        )
        for seed in (1, 2)
    )
    return folder, first, second


class TestPreNorm:
    """Fresh models: every γ is ones, which the exporter and the fusions merge into one tensor."""

    def test_the_patch_is_the_norms_and_kilobytes(self, kind: str, fleet) -> None:
        _, first, second = fleet
        vectors = PRE_NORM[kind][4]
        assert {array.shape for array in first.patch.tensors.values()} == {(128,)}
        assert first.patch.tensor_bytes == vectors * 128 * 4
        # the bundle has the first adapter's head, so the second brings its own
        assert second.patch.tensor_bytes == vectors * 128 * 4 + 2 * 128 * 4
        assert first.patch.tensor_bytes < 5_000 < 1_000_000 < first.bundle.manifest.graph.bytes

    def test_both_answer_as_their_full_exports(self, kind: str, model: Path, fleet, tmp_path: Path) -> None:
        _, *deltas = fleet
        fusion = deltas[0].patch.meta.fusion
        answers = []
        for seed, delta in enumerate(deltas, start=1):
            full = export(
                pre_norm_adapter(kind, model, seed), tmp_path / str(seed), optimize=fusion, prefer="smallest-patch"
            ).bundle
            answers.append(logits(delta.bundle))
            np.testing.assert_array_equal(answers[-1], logits(full))
            report = verify(delta.bundle)
            assert report.passed, report.reason
        assert not np.array_equal(*answers)

    def test_a_shift_before_a_layer_without_bias_needs_a_bundle_of_its_own(
        self, kind: str, model: Path, fleet, tmp_path: Path
    ) -> None:
        """Llama's layers have none; GPT-2's are zeros here, which the exporter leaves out."""
        folder, first, _ = fleet
        shifted = pre_norm_adapter(kind, model, 3, bias="shift")
        options = {"placement": "fold", "prefer": "own-weight"}
        with pytest.raises(PlanError, match=r"site '\w+\.(h|layers)\.[01]\..*' \(own weight\) has another structure"):
            export_delta(shifted, folder / "fleet.bundle", tmp_path / "p.patch", **options)
        assert list(tmp_path.iterdir()) == []
        if first.patch.meta.fusion == "none":
            own = export_delta(shifted, tmp_path / "own.bundle", tmp_path / "p.patch", optimize="none", **options)
            assert verify(own.bundle).passed
            assert verify(Bundle.open(own.bundle.path), use_torch=False).passed
