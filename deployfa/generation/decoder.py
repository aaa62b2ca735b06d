"""``Decoder``: one step of a decoder graph, its caches handed on as the runtime's own values, for every kind of bundle.

The graph reads a prompt (caches of length 0) and goes on from it; its inputs and outputs bear the names of Optimum and
onnxruntime-genai::

    input_ids, position_ids (batch, sequence)      attention_mask (batch, past + sequence)      int64
    past_key_values.I.key, .value                  (batch, key_value_heads, past, head_dim)
    logits_to_keep (kept,)                         the positions along ``sequence`` whose logits are computed, int64

    logits (batch, kept, vocabulary)               present.I.key, .value as the past, ``sequence`` longer
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_slots
from deployfa.edits import Array
from deployfa.errors import BundleError, InputError
from deployfa.mixed import MixedRunner
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.runtimes.runner import TensorSpec
from deployfa.runtimes.slots import Current, SlotAdapter, SlotRunner
from deployfa.runtimes.targets import is_engine, open_onnxruntime
from deployfa.tables import AdapterTable

__all__ = ["Caches", "Decoder", "Run", "open_decoder"]

#: ``past_key_values.I.key`` and ``.value`` → the runtime's own value.
Caches = Mapping[str, Any]
#: Runs the graph on values, with the adapters of the requests that its rows belong to: (batch,) positions in the list
#: of requests.
Run = Callable[[Mapping[str, Any], Array], dict[str, Any]]

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_WANTED = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")


class Decoder:
    """Thread-safe: caches and adapters are arguments of a call.

    Raises ``BundleError`` for a runner whose graph has other inputs or outputs than those above.
    """

    def __init__(self, runner: OnnxRuntimeRunner | SlotRunner | MixedRunner) -> None:
        self.runner = runner
        inputs = {spec.name: spec for spec in runner.inputs}
        outputs = {spec.name: spec for spec in runner.outputs}
        past = [name for name in inputs if _PAST.fullmatch(name)]
        lacking = [name for name in _WANTED if name not in inputs]
        lacking += [name for name in ("logits", *map(_present, past)) if name not in outputs]
        unknown = sorted(set(inputs) - {*_WANTED, *past})
        if lacking or unknown or not past:
            what = f"lacks '{lacking[0]}'" if lacking else f"takes '{unknown[0]}'" if unknown else "has no caches"
            raise BundleError(f"the graph {what}, so it is no decoder of deployfa's; export it for text-generation")
        self._empty = {name: _empty_shape(inputs[name], outputs[_present(name)]) for name in past}
        last = outputs["logits"].shape[-1]
        #: How many tokens there are, where the graph says so.
        self.vocabulary = last if isinstance(last, int) else None

    @contextlib.contextmanager
    def adapted(
        self,
        adapters: Sequence[str | None],
        strengths: Sequence[float | None],
        *,
        slot: SlotAdapter | Current | None = "current",
    ) -> Iterator[Run]:
        """What runs the graph for as many requests: of a pack, each with its own adapter and strength; of slots, all
        with ``slot``, ``None`` for the base, and the one strength.

        The adapters are those of this moment, whoever replaces one meanwhile.  Raises ``InputError`` for an adapter
        that there is not, and for adapters or strengths of a bundle that has neither.
        """
        runner = self.runner
        if isinstance(runner, MixedRunner):
            known = ", ".join(runner.adapters[:6])
            named = [name for name in adapters if name is not None]
            if len(named) < len(adapters):
                raise InputError(f"name the adapter that answers, 'base' for none; there are: {known}")
            wanted = np.array([1.0 if each is None else each for each in strengths], np.float32)
            with runner.lease() as lease:
                rows = runner.rows(named, lease)
                yield lambda values, at: runner.run_values(values, rows[at], strength=wanted[at], lease=lease)
            return
        if any(name is not None for name in adapters):
            raise InputError("the bundle holds one adapter at a time; name none, or make a pack: deployfa pack")
        if isinstance(runner, SlotRunner):
            if len(set(strengths)) > 1:
                raise InputError("slots have one strength for all; pass one, or make a pack: deployfa pack")
            # the adapter of all steps, whoever swaps meanwhile
            chosen = runner.current if isinstance(slot, str) else slot
            yield lambda values, _: runner.run_values(values, chosen, strength=strengths[0])
            return
        if isinstance(slot, SlotAdapter) or any(strength is not None for strength in strengths):
            raise InputError("the adapter is folded in; leave --adapter and --strength out, or export with --slots")
        yield lambda values, _: runner.run_values(values)

    def empty(self, batch: int) -> Caches:
        """The caches of ``batch`` rows that have read nothing yet."""
        return self.values(
            {name: np.zeros((batch, heads, 0, width), dtype) for name, (heads, width, dtype) in self._empty.items()}
        )

    def values(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """``arrays`` as the runtime's own values, on the same memory, checked against the inputs of their names."""
        return self.runner.values(arrays)

    def step(
        self, run: Run, at: Array, tokens: Array, mask: Array, positions: Array, caches: Caches
    ) -> tuple[Array, Caches]:
        """``tokens``, ``positions``: (batch, sequence), ``mask``: (batch, past + sequence), ``at``: (batch,), what
        ``run`` takes; → logits of the last position, (batch, vocabulary) float32, and the caches after it."""
        feeds = {
            "input_ids": np.ascontiguousarray(tokens),
            "attention_mask": np.ascontiguousarray(mask),
            "position_ids": np.ascontiguousarray(positions),
            "logits_to_keep": np.array([tokens.shape[1] - 1]),
        }
        found = run({**self.values(feeds), **caches}, at)
        return found["logits"].numpy()[:, -1], {name: found[_present(name)] for name in self._empty}


def open_decoder(
    bundle: Bundle,
    *,
    table: AdapterTable | None = None,
    target: str | None = None,
    threads: int | None = None,
    spinning: bool = True,
) -> Decoder:
    """The decoder of a bundle for text generation; ``table``: see ``MixedRunner``.

    Raises ``BundleError`` for a bundle of another task, ``InputError`` for a target that runs engines.
    """
    manifest = bundle.manifest
    if manifest.base.task != "text-generation":
        raise BundleError(f"'{bundle.path}' is for {manifest.base.task}; export one with --task text-generation")
    target = target or manifest.target
    if is_engine(target):
        raise InputError(f"generation runs in ONNX Runtime, which {target} is not; pick the target onnxruntime-cpu")
    runner: OnnxRuntimeRunner | SlotRunner | MixedRunner
    if manifest.tables is not None:
        runner = MixedRunner(bundle, table, target=target, threads=threads, spinning=spinning)
    elif manifest.slots is not None:
        runner = open_slots(bundle, target=target, threads=threads, spinning=spinning)
    else:
        runner = open_onnxruntime(
            target, bundle.graph, threads=threads, spinning=spinning, initializers=bundle.initializers
        )
    return Decoder(runner)


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.", 1)


def _empty_shape(past: TensorSpec, present: TensorSpec) -> tuple[int, int, np.dtype[Any]]:
    """Heads, width and type of a cache; of two shapes, the one that says a number."""
    sizes = []
    for axis in (1, 3):
        said = [spec.shape[axis] for spec in (past, present) if len(spec.shape) == 4]
        numbers = [size for size in said if isinstance(size, int)]
        if not numbers:
            raise BundleError(f"the graph does not say the size of axis {axis} of '{past.name}'; export it again")
        sizes.append(numbers[0])
    return sizes[0], sizes[1], np.dtype(past.dtype)
