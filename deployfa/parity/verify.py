"""Prove a bundle equal to the PyTorch model, or say by how much it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_engine
from deployfa.data import Row, label_ids
from deployfa.edits import Array
from deployfa.errors import InputError, MissingExtraError
from deployfa.graph.row_ops import ADAPTER_IDS
from deployfa.metrics import Labels
from deployfa.parity.cases import Case, make_cases, narrowed, of_one_token, read_cases
from deployfa.parity.measures import LIMIT, failure, measure, unmasked
from deployfa.parity.noise import Noise
from deployfa.parity.other import Other
from deployfa.parity.perplexity import compare_perplexity
from deployfa.parity.report import ParityReport, PerplexityParity, Stage
from deployfa.parity.slots import coarseness, slot_outputs, stages_on, with_idle
from deployfa.parity.truth import TORCH_TRUTH, run_graph, torch_log_likelihoods, torch_truth
from deployfa.preprocess import PromptPreprocessor, open_preprocessor
from deployfa.runtimes.targets import check_target, is_engine

__all__ = ["verify"]


def verify(
    bundle: Bundle,
    *,
    rows: Sequence[Row] | None = None,
    model: str | Path | None = None,
    adapter: Adapter | None = None,
    other: Other | None = None,
    use_torch: bool | None = None,
    target: str | None = None,
    engine: str | None = None,
    status: Callable[[str], None] | None = None,
) -> ParityReport:
    """Hold ``bundle`` against PyTorch (float64, adapter unfolded), or without torch against its stored reference.

    ``rows`` default to built-in samples; of a language model they are for its perplexity.  ``use_torch=None`` uses it
    when it is installed and the base model can be found.  ``target``: of ``deployfa.runtimes.targets``, by default the
    bundle's own.  ``engine``: which one, where there are several; it is judged by what its precision was allowed.  A
    patched bundle is held against the reference in the patch; PyTorch needs ``adapter`` too, the one that the patch was
    made from.  PyTorch alone can judge ``other``, an adapter for the slots of the bundle (``deployfa.slots``) or one of
    a pack (``deployfa.pack``); then nothing else is judged.

    Raises ``MissingExtraError`` / ``InputError`` when torch was asked for and cannot be used, and what a target raises
    that cannot be had.
    """
    say = status or (lambda _: None)
    manifest = bundle.manifest
    target = target or manifest.target
    check_target(target)
    if adapter is not None and bundle.patch is None:
        raise InputError(
            "the bundle brings its own adapter; pass --adapter only with --patch, or for a bundle with slots or a pack"
        )
    if other is not None:
        if use_torch is False:
            raise InputError(
                "only PyTorch knows the truth of another adapter; leave --no-torch out, or leave --adapter out to "
                "compare with the stored reference"
            )
        use_torch = True
    elif manifest.tables is not None:
        # the rows of a table are rounded; the adapters that they were made from are not in the bundle
        if use_torch or rows is not None:
            raise InputError(
                "a pack is held against the reference that was computed when it was packed; pass --no-torch and no "
                "--data, or name one of its adapters: --adapter NAME=FILE"
            )
        use_torch = False
    name = str(model or manifest.base.name)
    if use_torch is None:
        known = bundle.patch is None or adapter is not None
        use_torch = known and find_spec("torch") is not None and (model is not None or Path(name).is_dir())
    if use_torch and bundle.patch is not None and adapter is None:
        raise InputError("a patch holds no adapter for PyTorch to run; pass --adapter FILE, or --no-torch")
    if not use_torch:
        if rows is not None:
            raise InputError("rows of your own need PyTorch to know the truth; leave --data out, or pass --model DIR")
        say("comparing with the reference stored in the bundle")
        cases, noise = _stored(bundle)
        report = _report(bundle, cases, noise, manifest.reference.kind, None, [], target, engine)
        return report if manifest.slots is None else with_idle(bundle, report, cases, target=target, engine=engine)
    if find_spec("torch") is None:
        stored = "" if other is not None else " (--no-torch uses the stored reference)"
        raise MissingExtraError("torch", "train", f"verifying against PyTorch{stored}")
    if not name:
        raise InputError("the bundle names no base model; pass its directory with --model, or --no-torch")
    preprocessor = open_preprocessor(bundle.path, manifest.preprocessing)
    language = preprocessor if isinstance(preprocessor, PromptPreprocessor) else None
    if language is not None and rows is not None and other is not None:
        raise InputError(
            "the perplexity of another adapter is measured in a bundle of its own; export it, or leave --data out"
        )
    if language is not None:
        # with caches among them; rows are for the perplexity
        cases = [Case(case.feeds) for case in read_cases(bundle.reference)]
    else:
        cases = make_cases(preprocessor, [row.item for row in rows] if rows else preprocessor.samples)
    say(f"computing the truth in PyTorch float64 ({sum(case.size for case in cases)} rows)")
    # the manifest's base is the one it was exported on, also where a mismatch was allowed
    base = manifest.base if other is None else other.base
    adapter = dataclasses.replace(_judged(bundle, adapter, other), base=base)
    cases, noise, _ = torch_truth(name, adapter, cases, allow_mismatch=other is not None and other.allow_mismatch)
    if other is not None and other.row is not None:
        cases = [_in_pack(case, other.row) for case in cases]
    labels = None
    if rows and language is None and all(row.label is not None for row in rows):
        names = bundle.labels if other is None or not other.labels else other.labels
        labels = np.array(label_ids(rows, names), dtype=np.int64)
    float32 = [("PyTorch float32", list(noise.float32))]
    report = _report(bundle, cases, noise, TORCH_TRUTH, labels, float32, target, engine, other)
    if language is not None and rows and other is None:
        say(f"computing the perplexity of {len(rows)} rows, here and in PyTorch")
        truth = partial(torch_log_likelihoods, name, adapter, pad=language.pad_id)
        report = _with_perplexity(report, compare_perplexity(bundle, rows, truth, target=target, engine=engine))
    if manifest.slots is None or other is not None:
        return report
    return with_idle(bundle, report, cases, target=target, engine=engine, model=name)


def _with_perplexity(report: ParityReport, found: PerplexityParity) -> ParityReport:
    if found.passed or not report.passed:
        return msgspec.structs.replace(report, perplexity=found)
    if found.difference is None:
        reason = "the perplexity of the bundle or that of PyTorch is no finite number"
    else:
        reason = (
            f"the perplexity of the bundle differs from PyTorch's by {100 * found.difference:+.3g} %, "
            f"the limit is {100 * found.limit:g} %"
        )
    return msgspec.structs.replace(report, perplexity=found, passed=False, reason=reason)


def _longest(case: Case) -> int:
    """Tokens; 0 for what has none."""
    mask = case.feeds.get("attention_mask")
    return 0 if mask is None else int(mask.sum(-1).max())


def _judged(bundle: Bundle, adapter: Adapter | None, other: Other | None) -> Adapter:
    return adapter or (other.adapter if other is not None else Adapter.load(bundle.adapter))


def _in_pack(case: Case, row: int) -> Case:
    """Every row of ``case`` with the same row of the tables."""
    ids = np.full(case.size, row, np.int64)
    return dataclasses.replace(case, feeds={**case.feeds, ADAPTER_IDS: ids})


def _stored(bundle: Bundle) -> tuple[list[Case], Noise]:
    """The reference in the bundle; for a patch, the same inputs with the patch's own truth and noise."""
    cases = read_cases(bundle.reference)
    reference = bundle.manifest.reference
    if bundle.patch is None:
        return cases, Noise(reference.noise, reference.noise_max_abs, ())
    meta = bundle.patch.meta
    answers = bundle.patch.answers([case.size for case in cases])
    patched = [
        dataclasses.replace(case, truth=truth, base=base) for case, (truth, base) in zip(cases, answers, strict=True)
    ]
    return patched, Noise(meta.noise, meta.noise_max_abs, ())


def _report(
    bundle: Bundle,
    cases: Sequence[Case],
    noise: Noise,
    truth_name: str,
    labels: Labels | None,
    before: list[tuple[str, list[Array]]],
    target: str,
    engine: str | None,
    other: Other | None = None,
) -> ParityReport:
    truths = [case.truth for case in cases if case.truth is not None]
    bases = [case.base for case in cases if case.base is not None]
    data = np.concatenate([np.full(len(t), case.rows is not None) for case, t in zip(cases, truths, strict=True)])
    order = np.concatenate([np.array(case.rows, dtype=np.int64) for case in cases if case.rows] or [np.array([], int)])
    sorted_labels = labels[order] if labels is not None else None
    right = None
    if sorted_labels is not None:
        right = np.concatenate(truths).argmax(-1)[data] == sorted_labels
    if bundle.manifest.slots is not None:
        after = slot_outputs(bundle, cases, target, engine, other)
    else:
        after = _outputs(bundle, cases, target, engine)
    coarse = coarseness(bundle, target, engine)
    outputs = [(1.0, *each) for each in before] + [(coarse, *each) for each in after]
    stages = [
        measure(
            name, found, truths, bases, noise=scale * noise.relative, noise_max_abs=scale * noise.max_abs,
            data=data, labels=sorted_labels, truth_right=right,
        )
        for scale, name, found in outputs
    ]  # fmt: skip
    truth, base = np.concatenate(truths), np.concatenate(bases)
    base, truth = unmasked(base, truth)
    effect = float(np.linalg.norm(truth - base) / np.linalg.norm(truth))
    if bundle.manifest.tables is not None and other is None:
        trained = True
    elif bundle.patch is not None:
        trained = bundle.patch.meta.adapter.sites > 0
    else:
        trained = any(edit.distance() > 0 for edit in _judged(bundle, None, other).edits.values())
    passed, reason = _verdict(stages, noise, coarse, silent=trained and noise.silent(cases))
    return ParityReport(
        bundle=str(bundle.path),
        patch=str(bundle.patch.path) if bundle.patch is not None else None,
        adapter=other.name if other is not None else None,
        target=target,
        truth=truth_name,
        rows=len(truth),
        tokens_longest=max(_longest(case) for case in cases),
        noise=noise.relative,
        noise_max_abs=noise.max_abs,
        limit=LIMIT,
        effect=effect,
        truth_accuracy=float(right.mean()) if right is not None else None,
        stages=stages,
        passed=passed,
        reason=reason,
    )


def _outputs(bundle: Bundle, cases: Sequence[Case], target: str, engine: str | None) -> list[tuple[str, list[Array]]]:
    if is_engine(target):
        with open_engine(bundle, target, name=engine) as runner:
            names, output = [spec.name for spec in runner.inputs], runner.outputs[0].name
            answers = [of_one_token(runner.run({n: case.feeds[n] for n in names})[output]) for case in cases]
        found = [(name, answers) for name, _ in stages_on(target)]
    else:
        own: dict[str, Any] = {"target": target, "initializers": bundle.initializers, "bound": bundle.bound}
        found = [(name, run_graph(bundle.graph, cases, optimize=on, **own)) for name, on in stages_on(target)]
    # another adapter of a pack may have more labels
    return [(name, [narrowed(a, case) for a, case in zip(each, cases, strict=True)]) for name, each in found]


def _verdict(stages: Sequence[Stage], noise: Noise, coarse: float, *, silent: bool) -> tuple[bool, str]:
    if silent:
        return False, "the adapter is trained but changes nothing: a silent no-op"
    if not (np.isfinite(noise.relative) and noise.relative > 0):
        return False, "the model's own float32 noise could not be measured: NaN, infinity or zero"
    for stage in stages:
        if (reason := failure(stage)) is not None:
            return False, reason
    what = "the model's own float32 noise" if coarse == 1.0 else "the noise of the engine's precision"
    return True, f"every stage is within {LIMIT:g}x {what}"
