"""Adapters whose every number tells whose it is and which version: a torn, a stale and a stranger's row show."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit
from deployfa.serving.adapter_store import AdapterStore
from deployfa.serving.adapters import AdapterRegistry
from deployfa.serving.holders import TableHolder
from deployfa.serving.taken import Taken, TakenRow
from deployfa.tables import AdapterTable, Head, Layout, Segment, Vectors, base_row

SUFFIX = ".safetensors"
#: More than there are versions of one name.
VERSIONS = 10_000
#: wide enough that writing a row takes longer than a thread's turn
WIDTH = 20_000
LAYOUT = Layout(
    fingerprints=["sha256:a"],
    vectors=[
        Vectors(part="lambda", segments=[Segment(site="s", start=0, stop=WIDTH)]),
        Vectors(part="delta", segments=[Segment(site="s", start=0, stop=WIDTH)]),
    ],
    low_ranks=[],
    heads=[Head(site="head", in_features=4, out_features=2)],
)
BASE = base_row(LAYOUT, {"head": (np.zeros((2, 4), np.float32), None)})
#: What the bundle brings, at version 0.
OWN = ("own-a", "own-b")


def owner_of(name: str) -> int:
    """1 to 9, another one for every name in use here."""
    return {"own-a": 8, "own-b": 9}.get(name) or 1 + "abcdef".index(name)


def marked(name: str, version: int) -> Adapter:
    """Every number of its row is ``VERSIONS owner + version``, which float32 holds exactly."""
    mark = np.float32(VERSIONS * owner_of(name) + version)
    edit = Edit(lam=np.full(WIDTH, mark), delta=np.full(WIDTH, mark))
    head = {"weight": np.full((2, 4), mark), "bias": np.full(2, mark)}
    return Adapter("test", {"s": edit}, {"head": head}, BaseReference(fingerprint="sha256:a"), labels=(name, "x"))


def bytes_of(adapter: Adapter) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return adapter.save(Path(folder) / f"x{SUFFIX}").read_bytes()


@lru_cache(maxsize=64)
def content(name: str, version: int) -> bytes:
    """The file of ``marked``."""
    return bytes_of(marked(name, version))


def misfit(name: str) -> bytes:
    """A sound file of an adapter for another base."""
    return bytes_of(Adapter("test", marked(name, 0).edits, base=BaseReference(fingerprint="sha256:b")))


def damaged(name: str) -> bytes:
    return content(name, 0)[:-100]


def make_table(own: tuple[str, ...] = OWN) -> AdapterTable:
    """The table of a bundle that brings ``own``."""
    table = AdapterTable(LAYOUT, BASE, labels=("no", "yes"), max_adapters=20)
    table.add_many((name, marked(name, 0)) for name in own)
    return table


def make_registry(store: AdapterStore | None, max_resident: int | None = None) -> AdapterRegistry:
    return AdapterRegistry(TableHolder(make_table()), store=store, max_resident=max_resident)


def mark(taken: Taken | None) -> float:
    """What is in its row; fails on a torn one."""
    assert isinstance(taken, TakenRow) and taken.lease is not None
    edges = {
        float(edge)
        for name, array in taken.lease.arrays.items()
        for edge in (array[taken.row].min(), array[taken.row].max())
    }
    assert len(edges) == 1, f"{taken.name}: a torn row {sorted(edges)}"
    return edges.pop()


def version(taken: Taken | None) -> int:
    """Which version it is; fails on another one's row."""
    found = mark(taken)
    assert taken is not None
    assert found // VERSIONS == owner_of(taken.name), f"{taken.name}: the row of another one {found}"
    assert taken.labels == (taken.name, "x"), f"{taken.name}: the labels of another one {taken.labels}"
    taken.close()
    return int(found % VERSIONS)


def state(registry: AdapterRegistry) -> dict[str, int]:
    """Name → version of all that the registry answers with."""
    return {info.name: version(registry.fetch(info.name)) for info in registry.list() if info.name != "base"}
