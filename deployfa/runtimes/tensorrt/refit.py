"""Replace weights of a loaded engine by others of the same place, and prove the result.

λ as an input (slots) is what to prefer: it costs a copy of kilobytes.  A refit is for engines with an adapter folded
in, built with ``--refit``.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html (refitting an engine)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deployfa.edits import Array
from deployfa.errors import RuntimeTargetError
from deployfa.runtimes.tensorrt.runner import EngineRunner

__all__ = ["refit"]


def refit(
    runner: EngineRunner, weights: Mapping[str, Array], before: Mapping[str, Array], check: Callable[[], str | None]
) -> None:
    """Put ``weights``, initializer of the graph → array, into the engine of ``runner``.

    before: what is there now, by the same names.  check: asked afterwards, always; says what is wrong, or ``None``.
    If it finds something, or the library refuses, ``before`` is put back and ``RuntimeTargetError`` raised.
    """
    if not runner.record.refit:
        raise RuntimeTargetError(
            f"engine {runner.record.name} was not built to be refitted; build it again: {runner.record.command} --refit"
        )
    if set(weights) != set(before):
        missing = sorted(set(weights) ^ set(before))
        raise RuntimeTargetError(f"weight '{missing[0]}' has no counterpart to put back; pass both or neither")
    try:
        runner.replace_weights(weights)
        wrong = check()
    except BaseException:
        runner.replace_weights(before)
        raise
    if wrong is not None:
        runner.replace_weights(before)
        raise RuntimeTargetError(f"after the refit the engine is wrong ({wrong}); the weights before are back")
