"""What ``verify`` found; the schema of its ``--json``."""

from __future__ import annotations

import msgspec

__all__ = ["GreedyComparison", "GreedyReport", "ParityReport", "PerplexityParity", "Stage"]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One way of running the adapted model, against the truth.

    ``error`` is normwise, ``‖y - truth‖ / ‖truth‖`` over all logits of all rows; ``noise_ratio`` is it over the noise;
    ``effect_error`` is ``‖y - truth‖ / ‖truth - base‖``, the error in units of what the adapter does.  ``flips`` counts
    rows whose label differs from the truth's, ``flips_outside_noise`` those whose margin noise cannot explain.  Errors
    are ``None`` when the output holds NaN or infinity (``finite`` is then false): JSON has no word for them.
    """

    name: str
    error: float | None
    noise_ratio: float | None
    max_abs: float | None
    effect_error: float | None
    finite: bool
    flips: int
    flips_outside_noise: int
    accuracy: float | None = None
    mcnemar_p: float | None = None
    passed: bool


class PerplexityParity(msgspec.Struct, frozen=True, kw_only=True):
    """The perplexity of PyTorch (``truth``, float32, adapter unfolded) and of the bundle, on the same ``tokens``.

    ``difference``: of the second from the first, relatively; it may be ``limit`` in either direction.  ``None`` where
    they are NaN or infinity: JSON has no word for them.
    """

    tokens: int
    truth: float | None
    deployed: float | None
    difference: float | None
    limit: float

    @property
    def passed(self) -> bool:
        return self.difference is not None and abs(self.difference) <= self.limit


class GreedyComparison(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt in both runtimes.  tokens: how many are the same, from the first.  position: of the first that is not,
    ``None`` if all are; ours, theirs: what stands there, ``None`` behind an answer that had ended.

    our_gap: by how much our logit of our token is above our logit of theirs, both after the same text, and their_gap
    likewise in PyTorch.  explained: whether noise can close both at once; true where nothing differs.
    """

    prompt: str
    tokens: int
    position: int | None = None
    ours: int | None = None
    theirs: int | None = None
    our_gap: float | None = None
    their_gap: float | None = None
    explained: bool = True

    @property
    def equal(self) -> bool:
        return self.position is None


class GreedyReport(msgspec.Struct, frozen=True, kw_only=True):
    """passed: every difference is explained.  noise_max_abs: the largest error of a float32 logit against float64, by
    which differences are judged; each of the two runtimes may be ``LIMIT`` times it from the truth."""

    prompts: int
    equal: int
    max_new_tokens: int
    noise_max_abs: float
    limit: float
    passed: bool
    comparisons: list[GreedyComparison]


class ParityReport(msgspec.Struct, frozen=True, kw_only=True):
    """The stages, the truth they were held against, and the verdict.

    ``perplexity`` and ``greedy``: of a language model.  ``adapter``: what was judged instead of the bundle's own, in
    its slots, or of its pack; ``target``: where it ran.
    """

    bundle: str
    patch: str | None = None
    adapter: str | None = None
    target: str = "onnxruntime-cpu"
    truth: str
    rows: int
    tokens_longest: int
    noise: float
    noise_max_abs: float
    limit: float
    effect: float
    truth_accuracy: float | None
    stages: list[Stage]
    perplexity: PerplexityParity | None = None
    greedy: GreedyReport | None = None
    passed: bool
    reason: str

    def summary(self) -> dict[str, object]:
        """The part that goes into the bundle's manifest."""
        deployed = self.stages[-1]
        return {
            "passed": self.passed,
            "target": self.target,
            "truth": self.truth,
            "rows": self.rows,
            "error": deployed.error,
            "noise_ratio": deployed.noise_ratio,
            "flips": deployed.flips,
            "reason": self.reason,
        }
