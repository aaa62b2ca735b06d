"""Packs of the real MiniLM: what each row answers, whose labels it has, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from filelock import FileLock

from deployfa.adapter import Adapter, BaseReference
from deployfa.bundle import Bundle
from deployfa.convert import to_lora, with_strength
from deployfa.data import Row
from deployfa.edits import Array, Edit
from deployfa.errors import BaseMismatchError, BundleError, DeployfaError, InputError, PlanError, SiteError
from deployfa.mixed import MixedRunner, open_table
from deployfa.pack import FLEET, other_in_pack, pack
from deployfa.parity import verify
from deployfa.parity.cases import read_cases, write_cases
from deployfa.parity.measures import LIMIT, normwise
from deployfa.pipeline import export
from deployfa.predict import Predictor
from deployfa.preprocess import TextPreprocessor
from deployfa.preprocess.sentences import SENTENCES

TEXTS = [SENTENCES[number] for number in (0, 1, 2, 5, 9, 14, 20, 31, 40, 55, 60, 69)]


@pytest.fixture(scope="module")
def adapters(trained: dict[str, Path]) -> dict[str, Adapter]:
    """All methods, a head with three labels, and one that edits half of the sites and brings no edit of the rest."""
    vefa, lorfa, lora = (Adapter.load(trained[name]) for name in ("vefa", "lorfa", "lora"))
    random = np.random.default_rng(0)
    head = {"weight": random.standard_normal((3, 384)).astype(np.float32) / 20, "bias": np.arange(3, dtype=np.float32)}
    shifted = {
        site: Edit(lam=edit.lam, delta=0.1 * random.standard_normal(len(edit.lam)).astype(np.float32))
        for number, (site, edit) in enumerate(vefa.edits.items())
        if number % 2 and edit.lam is not None
    }
    three = dataclasses.replace(
        with_strength(vefa, 0.5), edits=shifted, modules={"classifier": head}, labels=("bad", "so so", "good")
    )
    return {"vefa": vefa, "lorfa": lorfa, "lora": lora, "three": three}


@pytest.fixture(scope="module")
def packs(shared: Path, adapters: dict[str, Adapter]) -> dict[str, Path]:
    """``baked`` and ``inputs``: do not write into them, copy first."""
    with FileLock(shared / "packs.lock"):
        for name, inputs in (("baked", False), ("inputs", True)):
            if not (shared / f"pack-{name}").is_dir():
                pack(adapters, shared / f"pack-{name}", optimize="ort", table_inputs=inputs, max_rank=16, max_labels=4)
    return {name: shared / f"pack-{name}" for name in ("baked", "inputs")}


def _alone(adapter: Adapter, folder: Path) -> Array:
    """The answers of the adapter's own folded bundle to ``TEXTS``."""
    return Predictor(export(adapter, folder, optimize="ort").bundle).logits(TEXTS)


@pytest.fixture(scope="module")
def alone(shared: Path, adapters: dict[str, Adapter], bundles: dict[str, Path]) -> dict[str, Array]:
    with FileLock(shared / "alone.lock"):
        for name in ("lorfa", "lora"):
            if not (shared / f"alone-{name}").is_dir():
                _alone(adapters[name], shared / f"alone-{name}")
    folders = {"vefa": bundles["folded"], "lorfa": shared / "alone-lorfa", "lora": shared / "alone-lora"}
    return {name: Predictor(Bundle.open(folder)).logits(TEXTS) for name, folder in folders.items()}


@pytest.mark.parametrize("kind", ["baked", "inputs"])
def test_each_row_is_its_own_adapters_bundle(kind: str, packs: dict[str, Path], alone: dict[str, Array]) -> None:
    bundle = Bundle.open(packs[kind])
    predictor = Predictor(bundle)
    names = [list(alone)[number % 3] for number in np.random.default_rng(0).permutation(len(TEXTS))]
    found = predictor.logits(TEXTS, adapters=names)
    own = np.stack([alone[name][row] for row, name in enumerate(names)])
    noise = bundle.manifest.reference.noise
    # two float32 graphs, each within the limit of the truth
    assert normwise(found[:, :2], own) <= 2 * LIMIT * noise
    # the same check sees two names swapped
    swapped = [{"vefa": "lorfa", "lorfa": "vefa"}.get(name, name) for name in names]
    assert normwise(predictor.logits(TEXTS, adapters=swapped)[:, :2], own) > 1000 * LIMIT * noise


@pytest.mark.parametrize("kind", ["baked", "inputs"])
def test_verify_passes_and_sees_two_rows_swapped(kind: str, packs: dict[str, Path], tmp_path: Path) -> None:
    bundle = Bundle.open(packs[kind])
    report = verify(bundle)
    assert report.passed, report.reason
    assert report.rows >= 70
    broken = tmp_path / "broken"
    shutil.copytree(packs[kind], broken)
    reference = broken / "reference.safetensors"
    changed = []
    for case in read_cases(reference):
        ids = case.feeds["adapter_ids"].copy()
        ids[case.feeds["adapter_ids"] == 1], ids[case.feeds["adapter_ids"] == 2] = 2, 1
        changed.append(dataclasses.replace(case, feeds={**case.feeds, "adapter_ids": ids}))
    write_cases(reference, changed)
    assert not verify(Bundle.open(broken, check_files=False)).passed


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("baked", "three"), ("inputs", "vefa")])
def test_one_adapter_of_a_pack_against_pytorch(
    kind: str, name: str, packs: dict[str, Path], adapters: dict[str, Adapter]
) -> None:
    """And another one's truth is not its."""
    bundle = Bundle.open(packs[kind])
    rows = [Row(text=text) for text in SENTENCES[:40]]
    report = verify(bundle, rows=rows, other=other_in_pack(bundle, name, adapters[name]))
    assert report.passed, report.reason
    assert report.adapter == name and report.stages[0].name == "PyTorch float32"
    wrong = other_in_pack(bundle, "lora", adapters[name])
    assert not verify(bundle, rows=rows, other=wrong).passed


def test_what_is_no_adapter_of_a_pack(packs: dict[str, Path], adapters: dict[str, Adapter], bundles) -> None:
    bundle = Bundle.open(packs["baked"])
    with pytest.raises(InputError, match="adapter 'lorf' is not in the table; nearest names: lorfa"):
        other_in_pack(bundle, "lorf", adapters["lorfa"])
    with pytest.raises(InputError, match="holds one adapter; make a pack with"):
        other_in_pack(Bundle.open(bundles["folded"]), "vefa", adapters["vefa"])
    stranger = dataclasses.replace(adapters["vefa"], base=BaseReference(fingerprint="sha256:feed"))
    with pytest.raises(BaseMismatchError, match="was trained on base feed"):
        other_in_pack(bundle, "vefa", stranger)
    with pytest.raises(InputError, match="leave --no-torch out"):
        verify(bundle, other=other_in_pack(bundle, "vefa", adapters["vefa"]), use_torch=False)


def test_an_answer_has_its_own_adapters_labels_only(packs: dict[str, Path]) -> None:
    predictor = Predictor(Bundle.open(packs["baked"]))
    first, second = predictor.answer(TEXTS[:2], adapters=["three", "vefa"])
    assert list(first.scores) == ["bad", "so so", "good"] and list(second.scores) == ["negative", "positive"]
    for answer in (first, second):
        assert sum(answer.scores.values()) == pytest.approx(1.0, abs=1e-6)
    logits = predictor.logits(TEXTS[:2], adapters=["three", "vefa"])
    assert logits.shape == (2, 4)
    assert np.isneginf(logits).tolist() == [[False] * 3 + [True], [False] * 2 + [True] * 2]


def test_strength_goes_from_the_base_to_the_adapter(
    packs: dict[str, Path], adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    predictor = Predictor(Bundle.open(packs["baked"]))
    names = ["vefa"] * len(TEXTS)
    whole = predictor.logits(TEXTS, adapters=names)
    assert np.array_equal(predictor.logits(TEXTS, adapters=names, strength=1.0), whole)
    half = predictor.logits(TEXTS, adapters=names, strength=0.5)
    own = _alone(with_strength(adapters["vefa"], 0.5), tmp_path / "half")
    # half of the adapter is another model, with its own noise
    noise = Bundle.open(tmp_path / "half").manifest.reference.noise
    assert normwise(half[:, :2], own) <= 2 * LIMIT * noise
    assert normwise(half[:, :2], whole[:, :2]) > 1000 * LIMIT * noise
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="between 0, the base, and 1"):
            predictor.logits(TEXTS, adapters=names, strength=wrong)


def test_adapters_come_and_go_without_a_new_session(packs: dict[str, Path], adapters: dict[str, Adapter]) -> None:
    bundle = Bundle.open(packs["inputs"])
    table = open_table(bundle)
    runner = MixedRunner(bundle, table)
    feeds = TextPreprocessor(packs["inputs"], max_length=128).encode(TEXTS)
    feeds = {spec.name: feeds[spec.name] for spec in runner.inputs}
    names = ["vefa", "lora", "base", "three"] * 3
    before = runner.run(feeds, names)["logits"]
    table.add("new", adapters["vefa"])
    after = runner.run(feeds, ["new", *names[1:]])["logits"]
    assert np.array_equal(after, before), "the same adapter under another name, and nobody else moved"
    table.replace("vefa", with_strength(adapters["vefa"], 0.5))
    moved = runner.run(feeds, names)["logits"]
    theirs = np.array([name != "vefa" for name in names])
    assert np.array_equal(moved[theirs], before[theirs])
    assert not np.array_equal(moved[~theirs], before[~theirs])
    table.remove("vefa")
    with pytest.raises(InputError, match="'vefa' is not in the table"):
        runner.run(feeds, names)
    assert np.array_equal(runner.run(feeds, ["new", *names[1:4], *["new", *names[1:4]] * 2])["logits"], before)
    # a LoRFA where low ranks are added to the output needs W, or the LoRA that it equals
    with pytest.raises(DeployfaError, match="deployfa convert ADAPTER --to lora"):
        table.add("lorfa 2", adapters["lorfa"])
    table.add("lorfa 2", to_lora(adapters["lorfa"]))


def test_labels_are_those_of_the_adapter_that_answered(packs: dict[str, Path], adapters: dict[str, Adapter]) -> None:
    """One with three labels is replaced by one with two, while the batch that it answers is on its way."""
    bundle = Bundle.open(packs["inputs"])
    table = open_table(bundle)
    predictor = Predictor(bundle, table=table)
    mixed = predictor._mixed
    assert mixed is not None
    run = mixed.run

    def slow(*arguments, **words):  # type: ignore[no-untyped-def]
        answer = run(*arguments, **words)
        table.replace("three", adapters["vefa"])
        return answer

    mixed.run = slow  # type: ignore[method-assign]
    (first,) = predictor.answer(TEXTS[:1], adapters=["three"])
    assert list(first.scores) == ["bad", "so so", "good"]
    (second,) = predictor.answer(TEXTS[:1], adapters=["three"])
    assert list(second.scores) == ["negative", "positive"]


def test_what_cannot_be_packed_is_refused_and_nothing_is_written(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    out = tmp_path / "out"
    vefa = adapters["vefa"]
    edit = next(iter(vefa.edits.values()))
    other = dataclasses.replace(vefa, base=_renamed(vefa, "sha256:" + "0" * 64))
    strange = dataclasses.replace(vefa, edits={"encoder.nothing": edit})
    unlike = dataclasses.replace(vefa, modules={"bert.embeddings.LayerNorm": {"weight": np.ones(384, np.float32)}})
    unknown = dataclasses.replace(vefa, base=_renamed(vefa, None))
    for wrong, kind, says in (
        (other, BaseMismatchError, "adapter 'b': the adapter was trained on base 000000000000"),
        (unknown, BaseMismatchError, "adapter 'b'.*--allow-base-mismatch"),
        (strange, SiteError, "adapter 'b': site 'encoder.nothing' not found"),
        (unlike, PlanError, "adapter 'b' replaces 'bert.embeddings.LayerNorm.weight'"),
    ):
        with pytest.raises(kind, match=says):
            pack({"a": vefa, "b": wrong}, out, optimize="none")
        assert not out.exists()
    with pytest.raises(InputError, match="base"):
        pack({"base": vefa}, out)
    with pytest.raises(InputError, match="no adapters"):
        pack({}, out)
    assert not out.exists()


def _renamed(adapter: Adapter, fingerprint: str | None) -> BaseReference:
    return msgspec.structs.replace(adapter.base, fingerprint=fingerprint)


def test_a_changed_fleet_or_manifest_is_noticed(packs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packs["inputs"], copy)
    content = bytearray((copy / FLEET).read_bytes())
    content[-1] ^= 1
    (copy / FLEET).write_bytes(content)
    with pytest.raises(BundleError, match="sha256 differs"):
        Bundle.open(copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "lora"', '"name": "lorx"'))
    with pytest.raises(BundleError, match="other adapters than the manifest"):
        assert Bundle.open(copy, check_files=False).bound
    manifest.write_text(manifest.read_text().replace('"name": "lorx"', '"name": "vefa"'))
    with pytest.raises(BundleError, match="names an adapter twice"):
        Bundle.open(copy, check_files=False)


def test_a_pack_asks_for_names_and_a_bundle_for_none(packs: dict[str, Path], bundles: dict[str, Path]) -> None:
    predictor = Predictor(Bundle.open(packs["baked"]))
    with pytest.raises(InputError, match="name the adapter that answers with --adapter; there are: base, vefa"):
        list(predictor.answer(TEXTS))
    with pytest.raises(InputError, match="no adapter 'vefo' in this pack; there are: vefa"):
        list(predictor.answer(TEXTS[:1], adapters=["vefo"]))
    with pytest.raises(InputError, match="2 adapters for 1 texts"):
        list(predictor.answer(TEXTS[:1], adapters=["vefa", "lora"]))
    with pytest.raises(InputError, match="holds one adapter"):
        list(Predictor(Bundle.open(bundles["folded"])).answer(TEXTS[:1], adapters=["vefa"]))
    with pytest.raises(InputError, match="--table-inputs"):
        open_table(Bundle.open(packs["baked"]))
    with pytest.raises(InputError, match="--no-torch"):
        verify(Bundle.open(packs["baked"]), use_torch=True)
