"""``SlotRunner``: one session whose adapter is a set of inputs, another one at every call if you like.

A swap costs nothing but handing the runtime other tensors: no session is made, no weight is touched.  Two ways give the
same bits: an ``.onnx_adapter`` file, which ONNX Runtime adds to the run itself, and arrays, which are fed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deployfa.edits import Array
from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError
from deployfa.runtimes.onnx_adapter import read_labelled
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.runner import Spinning, TensorSpec
from deployfa.runtimes.targets import DEFAULT_TARGET, open_onnxruntime
from deployfa.runtimes.tensorrt.runner import EngineRunner
from deployfa.tables import Layout
from deployfa.tables.checks import check_row
from deployfa.tables.layout import ACTIVE, LABELS, STRENGTH

__all__ = ["Current", "SlotAdapter", "SlotRunner"]

#: In the place of an adapter: the one that was swapped in last.
Current = Literal["current"]


@dataclass(frozen=True, eq=False)
class SlotAdapter:
    """One row, checked and ready to be run with; made by ``SlotRunner.load``.

    ``path``: the file it came from; ``labels``: what its answers mean, empty if nobody said.
    """

    row: Mapping[str, Array]
    path: Path | None
    labels: tuple[str, ...]
    _values: Mapping[str, Any]
    _lora: Any


class SlotRunner:
    """A session of a slot graph.  Thread-safe: which adapter runs is an argument of the call.

    layout: what the graph's row inputs hold.  runner: an engine of it, in the place of ``graph``, whose files were
    written for a graph with an idle branch if ``files_idle``.  The rest as for ``open_onnxruntime``.  Raises
    ``RuntimeTargetError`` for a graph that has no such inputs.
    """

    def __init__(
        self,
        graph: Path | bytes,
        layout: Layout,
        *,
        runner: EngineRunner | None = None,
        files_idle: bool | None = None,
        target: str = DEFAULT_TARGET,
        threads: int | None = None,
        spinning: Spinning = True,
        optimize: bool = True,
    ) -> None:
        self._runner: OnnxRuntimeRunner | EngineRunner = runner or open_onnxruntime(
            target, graph, threads=threads, spinning=spinning, optimize=optimize
        )
        self.layout = layout
        slots = {spec.name for spec in self._runner.slots}
        missing = sorted({*layout.shapes(), STRENGTH} - slots)
        if missing:
            raise RuntimeTargetError(f"the graph has no slot '{missing[0]}'; export it with --slots")
        self.idle_branch = ACTIVE in slots
        self._files_idle = self.idle_branch if files_idle is None else files_idle
        self._takes_labels = LABELS in slots
        self._current: SlotAdapter | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` must be fed, the adapter aside."""
        return self._runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.outputs

    @property
    def current(self) -> SlotAdapter | None:
        """What ``run`` uses where the call names none."""
        return self._current

    def load(self, source: Path | Mapping[str, Array], *, labels: Sequence[str] = ()) -> SlotAdapter:
        """An adapter from an ``.onnx_adapter`` file, or from a row in memory, which is copied.

        labels: what its answers mean; by default what the file says.
        Raises what ``read_labelled`` raises, and ``EditError`` for arrays that are no row of the layout.
        """
        lora = None
        if isinstance(source, Path):
            row: Mapping[str, Array]
            row, said = read_labelled(source, self.layout, idle_branch=self._files_idle)
            # an engine is fed the same numbers; so is a graph of an older deployfa a file with names of labels, which
            # the runtime refuses there
            takes = isinstance(self._runner, OnnxRuntimeRunner) and (self._takes_labels or not said)
            lora = _lora(source) if takes else None
            labels = labels or said
        else:
            check_row(self.layout, source)
            row = {name: np.array(array, order="C") for name, array in source.items()}
        for array in row.values():
            array.flags.writeable = False
        active = {ACTIVE: np.ones(1, np.float32)} if self.idle_branch else {}
        values = self._runner.values({**row, **active})
        return SlotAdapter(row, source if isinstance(source, Path) else None, tuple(labels), values, lora)

    def swap(self, adapter: SlotAdapter | None) -> SlotAdapter | None:
        """From now on ``run`` uses ``adapter``, or none, where the call names none; returns the one before.

        Runs that have begun go on with theirs.
        """
        before, self._current = self._current, adapter
        return before

    def run(
        self,
        feeds: Mapping[str, Array],
        adapter: SlotAdapter | Current | None = "current",
        *,
        strength: float | None = None,
    ) -> dict[str, Array]:
        """One inference with ``adapter``; with ``None`` the base.  ``strength`` in [0, 1]: how much of its features.

        Answers of an adapter with fewer labels than there is room for end in minus infinity.
        """
        chosen, strengths = self._chosen(adapter, strength)
        if chosen is None:
            return self._runner.run(feeds, {})
        fed = {**feeds, **strengths}
        if chosen._lora is None or isinstance(self._runner, EngineRunner):
            return self._runner.run(fed, chosen._values)
        options = _import_onnxruntime().RunOptions()
        options.add_active_adapter(chosen._lora)
        return self._runner.run(fed, {}, options=options)

    def values(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """``arrays`` as the runtime's own values, for ``run_values``."""
        return self._runner.values(arrays)

    def run_values(
        self,
        values: Mapping[str, Any],
        adapter: SlotAdapter | Current | None = "current",
        *,
        strength: float | None = None,
    ) -> dict[str, Any]:
        """``run`` with the runtime's own values in and out, as ``OnnxRuntimeRunner.run_values``."""
        if isinstance(self._runner, EngineRunner):
            raise RuntimeTargetError("an engine hands no values on; pick the target onnxruntime-cpu")
        chosen, strengths = self._chosen(adapter, strength)
        if chosen is None:
            return self._runner.run_values(values, {})
        return self._runner.run_values({**values, **self._runner.values(strengths)}, chosen._values)

    def _chosen(
        self, adapter: SlotAdapter | Current | None, strength: float | None
    ) -> tuple[SlotAdapter | None, dict[str, Array]]:
        """Which adapter runs, and its strength as a feed."""
        chosen = self._current if adapter == "current" else adapter
        assert not isinstance(chosen, str)  # what the type says, for the type checker
        if strength is None:
            return chosen, {}
        if chosen is None:
            raise InputError("a strength is for an adapter, and none is active; leave it out, or pass an adapter")
        if not 0.0 <= strength <= 1.0:
            raise InputError(f"strength {strength} is not between 0, the base, and 1, the adapter; pass 0.5")
        return chosen, {STRENGTH: np.full(1, strength, np.float32)}


def _lora(path: Path) -> Any:
    adapter = _import_onnxruntime().LoraAdapter()
    try:
        adapter.Load(str(path))
    except Exception as error:  # its exceptions share no base class
        raise RuntimeTargetError(f"onnxruntime does not load '{path}'; convert the adapter again") from error
    return adapter


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu", "running a graph") from error
    return onnxruntime
