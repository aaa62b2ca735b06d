"""What holds adapters in memory: rows of a table, slots, a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployfa.adapter import Adapter, BaseReference
from deployfa.bundle import Bundle
from deployfa.bundle.manifest import (
    FORMAT,
    AdapterSummary,
    GraphSummary,
    Manifest,
    Optimization,
    Preprocessing,
    Reference,
    Tables,
)
from deployfa.bundle.open_engine import open_slots
from deployfa.edits import Array
from deployfa.errors import AdapterFormatError, BaseMismatchError, InputError, StorageError
from deployfa.serving.holders import FixedHolder, SlotHolder, TableHolder
from deployfa.serving.taken import TakenRow, TakenSlot
from deployfa.tables import AdapterTable, Layout, LowRanks, Member, Segment, Vectors, base_row

from .marked import BASE, LAYOUT, content, make_table, mark, marked, version

# every part that a layout can have; as tests/tables/tiny.py, without its adapters
PARTS = Layout(
    fingerprints=["sha256:a"],
    vectors=[
        Vectors(part="lambda", segments=[Segment(site="q", start=0, stop=5), Segment(site="up", start=5, stop=13)]),
        Vectors(part="delta", segments=[Segment(site="up", start=0, stop=8)]),
        Vectors(part="out_lambda", segments=[Segment(site="q", start=0, stop=6)]),
    ],
    low_ranks=[
        LowRanks(where="input", sites=["q"], in_features=5, rank=3, widths=[5]),
        LowRanks(where="output", sites=["up"], in_features=8, rank=2, widths=[3]),
    ],
    heads=LAYOUT.heads,
)


def saved(adapter: Adapter, folder: Path) -> Path:
    return adapter.save(folder / "x.safetensors", force=True)


def full_disk() -> None:
    raise StorageError("full")


def test_a_table(tmp_path: Path) -> None:
    holder = TableHolder(make_table())
    assert holder.names() == ["base", "own-a", "own-b"] == list(holder.held())
    facts = holder.put("a", saved(marked("a", 3), tmp_path))
    assert facts == holder.held()["a"]
    assert (facts.method, facts.labels, facts.parameters) == ("test", ("a", "x"), 2 * 20_000)
    assert facts.bytes == holder.row_bytes == 4 * (2 * 20_000 + 8 + 2)
    old = holder.take("a")
    holder.put("a", saved(marked("a", 4), tmp_path))
    assert version(holder.take("a")) == 4
    holder.drop("a")
    assert holder.take("a") is None
    assert version(old) == 3
    base = holder.take("base")
    assert base is not None and base.row == 0 and base.labels == ("no", "yes") and mark(base) == 0
    base.close()
    base.close()
    assert not holder.full
    with pytest.raises(InputError, match="not in the table"):
        holder.drop("a")


def test_a_table_says_when_it_is_full(tmp_path: Path) -> None:
    holder = TableHolder(AdapterTable(LAYOUT, BASE, max_adapters=1))
    assert not holder.full
    holder.put("a", saved(marked("a", 0), tmp_path))
    assert holder.full


def test_what_cannot_be_read_or_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    holder = TableHolder(make_table())
    (tmp_path / "broken.safetensors").write_bytes(content("own-a", 1)[:-100])
    with pytest.raises(AdapterFormatError):
        holder.put("own-a", tmp_path / "broken.safetensors")
    other = Adapter("test", marked("own-a", 1).edits, base=BaseReference(fingerprint="sha256:b"))
    with pytest.raises(BaseMismatchError):
        holder.put("own-a", saved(other, tmp_path))
    assert version(holder.take("own-a")) == 0


def parts(seed: int) -> Adapter:
    """Every part, with zeros of both signs and ranks below the room."""
    from deployfa.edits import Edit, LowRank

    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return np.round(rng.standard_normal(shape).astype(np.float32), 1)

    edits = {
        "q": Edit(lam=draw(5), output_scale=draw(6), input_low_rank=LowRank(draw(2, 5), draw(5, 2), 0.75)),
        "up": Edit(lam=draw(8), delta=draw(8), output_low_rank=LowRank(draw(1, 8), draw(3, 1), 1.25)),
    }
    modules = {} if seed % 2 else {"head": {"weight": draw(1, 4), "bias": draw(1)}}
    labels = () if seed % 3 else ("one",)
    return Adapter("mixed", edits, modules, BaseReference(fingerprint="sha256:a"), labels=labels if modules else ())


@pytest.mark.parametrize("seed", range(6))
def test_a_table_takes_the_old_one_back_bit_for_bit(tmp_path: Path, seed: int) -> None:
    head = (np.ones((2, 4), np.float32), np.ones(2, np.float32))
    table = AdapterTable(PARTS, base_row(PARTS, {"head": head}), labels=("no", "yes"))
    holder = TableHolder(table)
    holder.put("a", saved(parts(seed), tmp_path))

    def seen() -> tuple[dict[str, Array], Any]:
        with table.snapshot() as lease:
            row = int(lease.rows(["a"])[0])
            return {name: array[row].copy() for name, array in lease.arrays.items()}, lease.labels("a")

    before, labels = seen()
    holder.put("b", saved(parts(seed + 50), tmp_path))
    put = holder.prepare("a", saved(parts(seed + 100), tmp_path))
    with pytest.raises(StorageError, match="full"):
        put(full_disk)
    after, still = seen()
    assert still == labels
    for name, array in before.items():
        assert np.array_equal(array, after[name]), name
    put(lambda: None)
    assert any(not np.array_equal(array, before[name]) for name, array in seen()[0].items())
    new = holder.prepare("c", saved(parts(1), tmp_path))
    with pytest.raises(StorageError):
        new(full_disk)
    assert holder.take("c") is None


def baked() -> Bundle:
    """A manifest as a pack with its tables in the graph has it."""
    members = [Member(name="base", method="base", labels=("no", "yes")), Member(name="a", method="test", parameters=7)]
    manifest = Manifest(
        format=FORMAT,
        target="onnxruntime-cpu",
        base=BaseReference(),
        adapter=AdapterSummary(method="pack", sites=1, parameters=7, module_parameters=0, training={}),
        plan={},
        graph=GraphSummary(file="model.onnx", opset=20, inputs=[], outputs=[], bytes=0),
        optimization=Optimization(asked="none", chosen="none", shapes=[], threads=1, tried=[]),
        preprocessing=Preprocessing(kind="text", max_length=8),
        reference=Reference(file="r", kind="graph", rows=1, noise=0.0, noise_max_abs=0.0),
        labels=[],
        versions={},
        files={},
        tables=Tables(layout=LAYOUT, adapters=members, inputs=False),
    )
    return Bundle(Path("pack"), manifest)


def test_adapters_in_a_graph_stay(tmp_path: Path) -> None:
    holder = FixedHolder(baked())
    assert holder.names() == ["base", "a"] and holder.suffixes == ()
    assert holder.take("a") == TakenRow("a", (), 1, None) and holder.take("b") is None
    assert holder.take("base") == TakenRow("base", ("no", "yes"), 0, None)
    assert holder.held()["a"].parameters == 7 and holder.row_bytes == TableHolder(make_table()).row_bytes
    for change in (holder.check_changeable, lambda: holder.drop("a"), lambda: holder.put("b", tmp_path / "x")):
        with pytest.raises(InputError, match=r"'pack' keeps its adapters in the graph; pack it with --table-inputs"):
            change()
    assert holder.names() == ["base", "a"]


def test_slots(slot_bundles: dict[str, Path], trained: dict[str, Path], tmp_path: Path) -> None:
    """The real MiniLM: the bundle's own, another one of each kind of file, and what a request took stays."""
    import dataclasses

    from deployfa.convert import with_strength
    from deployfa.slots import write_slot

    bundle = Bundle.open(slot_bundles["vefa"])
    runner = open_slots(bundle)
    holder = SlotHolder(bundle, runner)
    assert holder.names() == ["base", "default"] and not holder.full
    tokens = {spec.name: np.ones((2, 5), np.int64) for spec in runner.inputs}
    tokens["input_ids"] = np.arange(2000, 2010).reshape(2, 5)

    def answer(name: str) -> Array:
        taken = holder.take(name)
        assert isinstance(taken, TakenSlot)
        return next(iter(runner.run(tokens, taken.adapter).values()))

    own = Adapter.load(trained["vefa"])
    assert holder.held()["default"].parameters == own.parameters and holder.held()["default"].method == "vefa"
    assert holder.take("default").labels == ("negative", "positive")  # type: ignore[union-attr]
    half = dataclasses.replace(with_strength(own, 0.5), labels=("bad", "good"))
    facts = holder.put("half", half.save(tmp_path / "half.safetensors"))
    assert facts.labels == ("bad", "good") and facts.parameters == own.parameters and facts.bytes == holder.row_bytes
    write_slot(bundle, half, tmp_path / "same.onnx_adapter")
    said = holder.put("same", tmp_path / "same.onnx_adapter")
    assert (said.method, said.parameters, said.labels) == ("onnx_adapter", None, ("bad", "good"))
    assert np.array_equal(answer("half"), answer("same"))
    assert len({answer(name).tobytes() for name in ("base", "default", "half")}) == 3
    # the file that it was read from goes, as after an upload
    (tmp_path / "same.onnx_adapter").unlink()
    old, before = holder.take("default"), answer("default")
    with pytest.raises(StorageError):
        holder.prepare("default", tmp_path / "half.safetensors")(full_disk)
    assert np.array_equal(answer("default"), before)
    holder.put("default", tmp_path / "half.safetensors")
    assert np.array_equal(answer("default"), answer("same"))
    holder.drop("default")
    assert holder.take("default") is None
    assert isinstance(old, TakenSlot)
    assert np.array_equal(next(iter(runner.run(tokens, old.adapter).values())), before)
    (tmp_path / "bad.onnx_adapter").write_bytes(b"TORT")
    with pytest.raises(AdapterFormatError):
        holder.put("half", tmp_path / "bad.onnx_adapter")
    for name in ("base", "default"):
        with pytest.raises(InputError, match="cannot be removed"):
            holder.drop(name)
