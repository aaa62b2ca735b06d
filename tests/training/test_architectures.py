"""Every architecture of the placements table: exported, found, planned, placed, compared, and the table itself."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from architectures import ARCHITECTURES
from placements import ADAPTERS, MODES, measure
from placements_table import Row, markdown

from deployfa.parity.measures import LIMIT

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def committed() -> list[Row]:
    content = msgspec.json.decode((RESULTS / "placements.json").read_bytes())
    return msgspec.convert(content["rows"], list[Row])


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_found_and_every_placement_is_exact(name: str) -> None:
    row = measure(name)
    assert (row.found, row.missing) == (row.expected, [])
    assert row.found > 8
    assert row.not_in_float64 is None
    assert set(row.adapters) == set(ADAPTERS)
    for kind, measured in row.adapters.items():
        assert measured.effect > 1000 * LIMIT, f"{kind} does something"
        assert measured.corrupted > 100 * LIMIT, f"{kind}: two numbers of one edit swapped are seen"
        for mode, parity in measured.modes.items():
            assert parity.failure is None, f"{kind}, {mode}"
            assert parity.onnxruntime is not None and parity.onnxruntime <= LIMIT, f"{kind}, {mode}"
            # what is stored is rounded once to float32, the rest is float64: less than a run that rounds everything
            assert parity.float64 is None or parity.float64 <= 1, f"{kind}, {mode}"
            assert sum(parity.placements.values()) == row.found
        assert measured.modes["side op"].placements == {"side op": row.found}
    # a head that is tied to the embedding may stay beside its weight
    assert set(row.adapters["VeFA"].modes["auto"].reasons) <= {"lm_head"}


def test_the_table_is_of_every_architecture(committed: list[Row]) -> None:
    assert [row.architecture for row in committed] == list(ARCHITECTURES)
    assert all(list(row.adapters) == list(ADAPTERS) for row in committed)
    assert all(list(each.modes) == list(MODES) for row in committed for each in row.adapters.values())


def test_the_table_is_made_from_its_figures(committed: list[Row]) -> None:
    text = markdown(committed)
    assert (RESULTS / "placements.md").read_text(encoding="utf-8") == text
    assert all(f"| {name} |" in text for name in ARCHITECTURES)


def test_the_table_names_what_is_missing_and_what_failed(committed: list[Row]) -> None:
    first = committed[0]
    kind, measured = next(iter(first.adapters.items()))
    mode, parity = next(iter(measured.modes.items()))
    broken = msgspec.structs.replace(parity, onnxruntime=None, failure="does not load")
    modes = {**measured.modes, mode: broken}
    row = msgspec.structs.replace(
        first, found=first.found - 1, missing=["a.b"], adapters={kind: msgspec.structs.replace(measured, modes=modes)}
    )
    text = markdown([row])
    assert f"| {first.found - 1} / {first.expected} |" in text
    assert f"- {first.architecture}: a.b" in text
    assert f"- {first.architecture}, {kind}, {mode}: does not load" in text
