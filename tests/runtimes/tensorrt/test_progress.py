"""How far a build is: never back, never more than all, and all in the end."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from deployfa.runtimes.tensorrt import build_engine
from deployfa.runtimes.tensorrt.progress import Phases

from .small import small_request

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["start", "step", "finish"]),
        st.sampled_from("abcd"),
        st.sampled_from(["a", "b", "c", "d", None]),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(EVENTS)
def test_whatever_a_library_reports_the_share_never_falls(events: list[tuple[str, str, str | None, int]]) -> None:
    """A parent that is not open, or a step too many, is no reason to fail; a phase within itself is not reported."""
    phases, before = Phases(), 0.0
    parents: dict[str, str | None] = {}
    for kind, name, parent, steps in events:
        if kind == "start":
            # no phase is its own ancestor
            above = parent
            while above is not None and above != name:
                above = parents.get(above)
            parents[name] = None if above == name else parent
            phases.start(name, parents[name], steps)
        elif kind == "step":
            phases.step(name)
        else:
            phases.finish(name)
            parents.pop(name, None)
        share = phases.share()
        assert before <= share <= 1.0
        before = share


def test_a_phase_counts_within_its_parents_step() -> None:
    phases = Phases()
    phases.start("build", None, 4)
    assert phases.share() == 0
    phases.step("build")
    assert phases.share() == 1 / 4
    phases.start("kernels", "build", 10)
    phases.step("kernels")
    assert phases.share() == (1 + 1 / 10) / 4
    phases.start("one kernel", "kernels", 2)
    phases.step("one kernel")
    assert phases.share() == (1 + (1 + 1 / 2) / 10) / 4
    phases.finish("one kernel")
    phases.finish("kernels")
    assert phases.share() == (1 + (1 + 1 / 2) / 10) / 4, "not back"
    for _ in range(3):
        phases.step("build")
    assert phases.share() == 1


def test_a_real_build_ends_at_all_of_it(tmp_path: Path) -> None:
    shares: list[float] = []
    build_engine(small_request(tmp_path), tmp_path / "engine", shares.append)
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.1
    assert shares[-1] == 1 and shares.count(1) == 1
