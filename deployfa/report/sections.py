"""The sections of the page, top to bottom.  Every sentence holds for any report, good or bad."""

from __future__ import annotations

from collections.abc import Mapping

from deployfa.parity import ParityReport, Stage
from deployfa.report.demo_report import DemoReport
from deployfa.report.figures import (
    DASH,
    TRAINING_DOMAIN,
    domains,
    figure,
    listed,
    percent,
    ratio,
    scientific,
    shape,
    shifted,
    shifted_mean,
)
from deployfa.report.markup import Html, drawn, table, tag

__all__ = ["accuracy", "caveats", "opening", "parity", "placement", "repeating", "sentence", "summary"]

Plots = Mapping[str, Html]


def opening(report: DemoReport) -> Html:
    """Title, what was done, what came out in three or four figures, and what went wrong if anything did."""
    names = listed([method.method for method in report.methods])
    away = listed(shifted(report))
    ways = listed([each.bundle for each in report.bundles])
    lead = (
        f"The pretrained model {report.model} was trained on {report.train_rows:,} labelled rows of the "
        f"{TRAINING_DOMAIN} domain by {len(report.methods)} methods ({names}), and scored there and on domains it was "
        f"not trained on ({away or 'none'}). One adapter then went into the model's ONNX graph in "
        f"{len(report.bundles)} ways ({ways}). Each bundle was held against the unfolded truth and timed against the "
        "base graph, and one answered a sentence. Every figure on this page was measured in that run."
    )
    failed = [name for name, found in report.parity.items() if not found.passed]
    broken = [tag("p", f"Parity FAILED for {name}: {report.parity[name].reason}", class_="note bad") for name in failed]
    return tag(
        "header",
        tag("p", "deployfa demo", class_="eyebrow"),
        tag("h1", f"From a trained adapter to ONNX: {report.model}"),
        tag("p", lead, class_="lead"),
        tag("p", f"Run of {report.created}, seed {report.seed}.", class_="soft"),
        broken,
        tag("div", _cards(report), class_="cards"),
    )


def summary(report: DemoReport) -> Html:
    """Methods against domains."""
    names, away = domains(report), shifted(report)
    head = ["method", "trainable parameters", "training (s)", *(f"{n} (%)" for n in names), "mean of shifted (%)"]
    rows = [
        [
            method.method,
            f"{method.trainable_parameters:,}",
            figure(method.seconds),
            *(percent(method.scores[n].balanced_accuracy if n in method.scores else None) for n in names),
            percent(shifted_mean(method, away)),
        ]
        for method in report.methods
    ]
    return tag(
        "section",
        tag("h2", "Summary"),
        table("Balanced accuracy (%) by method and domain", head, rows),
        tag(
            "p",
            "Balanced accuracy is the mean over classes of the share of that class that was found. "
            f"{TRAINING_DOMAIN} is the training domain's test set; shifted: {listed(away) or 'none'}.",
            class_="foot",
        ),
    )


def accuracy(report: DemoReport, plots: Plots) -> Html:
    """The grouped bars, and accuracy and rows behind them."""
    rows = [
        [name, method.method, f"{found.rows:,}", percent(found.accuracy), percent(found.balanced_accuracy)]
        for name in domains(report)
        for method in report.methods
        if (found := method.scores.get(name)) is not None
    ]
    head = ["domain", "method", "rows", "accuracy (%)", "balanced accuracy (%)"]
    return tag(
        "section",
        tag("h2", "How good is each method, and away from home?"),
        drawn(
            plots,
            "accuracy",
            "One run a method, one seed: no spread was measured, so small differences may be chance.",
        ),
        tag("details", tag("summary", "Rows and plain accuracy"), table("Scores", head, rows, words=(1,))),
    )


def placement(report: DemoReport) -> Html:
    """Where the edits went and what they cost."""
    rows = [
        [
            each.bundle,
            f"{each.folded:,}",
            f"{each.side_ops:,}",
            f"{each.extra_flops_per_token:,}",
            f"{each.extra_bytes:,}",
            figure(each.graph_bytes / 1e6),
            each.fusion_kept,
        ]
        for each in report.bundles
    ]
    head = ["bundle", "edits folded", "side ops", "extra FLOP / token", "extra bytes", "graph (MB)", "fusion"]
    text = (
        "A folded edit is multiplied into the weights beside it and adds no operator; a side op stays in the graph as "
        "an operator of its own."
    )
    return tag("section", tag("h2", "Where the edits went"), tag("p", text), table("Bundles", head, rows, words=(6,)))


def parity(report: DemoReport, plots: Plots) -> Html:
    """How equal each stage is, in units of the model's own noise."""
    text = (
        "No two ways of computing a model in float32 agree to the last bit, so an error means nothing without a scale. "
        "The scale here is the model's own noise: how far the same adapted model in float32 is from itself in float64, "
        "on the same rows, at most, in several runs. A stage passes when its error is at most the limit times that "
        "noise, no output is NaN or infinite, and no label flips that noise cannot explain."
    )
    parts = [part for name, found in report.parity.items() for part in _parity_of(name, found)]
    caption = "Zero would be the float64 truth itself, 1 is as far as float32 in PyTorch was from it at most."
    return tag(
        "section", tag("h2", "Is it still the same model?"), tag("p", text), drawn(plots, "parity", caption), parts
    )


def sentence(report: DemoReport) -> Html:
    """The answer at the end."""
    answer = report.sentence
    return tag(
        "section",
        tag("h2", "And it answers"),
        tag("blockquote", answer.text),
        tag("p", tag("strong", answer.label), f" with a score of {answer.score:.3f}."),
    )


def caveats(report: DemoReport) -> Html:
    """What the figures do not say."""
    settings, machine = report.bench.settings, report.bench.machine
    load = "unknown" if machine.load_1min is None else f"{machine.load_1min:.2f}"
    items = [
        f"One seed ({report.seed}): another would move every accuracy, and no spread across seeds was measured.",
        "The scores are of one split of the data, and no interval was computed for them.",
        f"The latency is this machine's ({machine.cores} cores, load {load} before the bench), of the graph alone: "
        "tokenizing is not in it.",
        f"Spinning was {listed(list(settings.spinning))}: with spinning on, threads that wait burn their cores.",
        "Parity was measured on the rows named above; it bounds the error there, not on every input there is.",
        *(f"The bench warned: {warning}." for warning in report.bench.warnings),
    ]
    return tag("section", tag("h2", "What to keep in mind"), tag("ul", [tag("li", item) for item in items]))


def repeating(report: DemoReport) -> Html:
    """Commands, seconds of each stage, machine and versions."""
    longest = max(report.stage_seconds.values(), default=0.0)
    rows = []
    for name, seconds in report.stage_seconds.items():
        share = 100 * seconds / longest if longest > 0 else 0.0
        bar = tag("div", tag("span", style=f"width: {share:.1f}%"), class_="track", aria_hidden="true")
        rows.append([name, f"{seconds:,.1f}", bar])
    total = sum(report.stage_seconds.values())
    machine = report.bench.machine
    facts = {
        "machine": f"{machine.cpu}, {machine.cores} cores",
        "system": machine.system,
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "versions when timed": ", ".join(f"{n} {v}" for n, v in {"python": machine.python, **machine.versions}.items()),
    }
    return tag(
        "section",
        tag("h2", "Do it again"),
        tag(
            "p",
            tag("code", f"deployfa demo --seed {report.seed}"),
            " repeats every stage and prints the command of each before it runs: any of them can be typed alone. ",
            tag("code", "deployfa report report.json"),
            " draws this page again.",
        ),
        table(f"Stages, {total:,.1f} s in all", ["stage", "seconds", ""], rows, words=(2,)),
        tag("dl", [part for k, v in facts.items() for part in (tag("dt", k), tag("dd", v))], class_="facts"),
    )


def _cards(report: DemoReport) -> list[Html]:
    cards = []
    away = shifted(report)
    means = {m.method: mean for m in report.methods if (mean := shifted_mean(m, away)) is not None}
    if means:
        best = max(means, key=lambda name: means[name])
        others = ", ".join(f"{name} {percent(mean)}" for name, mean in means.items() if name != best)
        under = f"highest: {best}" + (f" (others: {others})" if others else "")
        cards.append(_card("balanced accuracy, mean of shifted", f"{percent(means[best])} %", under))
    if report.parity:
        passed = sum(found.passed for found in report.parity.values())
        parts = [
            f"{name} {figure(found.stages[-1].noise_ratio)}× noise"
            for name, found in report.parity.items()
            if found.stages
        ]
        cards.append(_card("parity", f"{passed} of {len(report.parity)} pass", ", ".join(parts)))
    reference = report.bench.contenders[0].label if report.bench.contenders else ""
    for each in report.bench.contenders[1:]:
        found = [r for r in report.bench.results if r.contender == each.label and r.ratio is not None]
        if found:
            # the largest shape: the one where the arithmetic weighs most
            largest = max(found, key=lambda r: r.batch * r.sequence)
            under = f"at {shape(largest)}: {ratio(largest)}, {largest.verdict or 'no verdict'}"
            cards.append(_card(f"latency of {each.label}", f"{largest.ratio:.2f}× {reference}", under))
    return cards


def _card(name: str, big: str, under: str) -> Html:
    return tag(
        "div",
        tag("p", name, class_="name"),
        tag("p", big, class_="big"),
        tag("p", under, class_="under"),
        class_="card",
    )


def _parity_of(name: str, found: ParityReport) -> list[Html]:
    scored = any(stage.accuracy is not None for stage in found.stages)
    head = ["stage", "error / ‖truth‖", "error / noise", "max abs error (logits)", "error / adapter's effect", "flips"]
    head += ["accuracy (%)", "McNemar p"] if scored else []
    facts = (
        f"Truth: {found.truth}. Noise {found.noise:.2e} of ‖truth‖; the adapter's own effect {found.effect:.2f} of "
        f"‖truth‖; limit {found.limit:g} times the noise; longest row {found.tokens_longest} tokens"
    )
    if found.truth_accuracy is not None:
        facts += f"; accuracy of the truth {percent(found.truth_accuracy, 2)} %"
    rows = [_stage_row(stage, scored) for stage in found.stages]
    caption = f"{name}: {found.rows:,} rows against the truth"
    return [
        table(caption, [*head, "verdict"], rows, words=(len(head),)),
        tag("p", _verdict(found.passed), f": {found.reason}. {facts}.", class_="foot"),
    ]


def _stage_row(stage: Stage, scored: bool) -> list[str]:
    effect = DASH if stage.effect_error is None else f"{stage.effect_error:.1e}"
    row = [
        stage.name,
        scientific(stage.error, 2),
        figure(stage.noise_ratio),
        scientific(stage.max_abs, 1),
        effect,
        str(stage.flips),
    ]
    if scored:
        row += [percent(stage.accuracy, 2), DASH if stage.mcnemar_p is None else f"{stage.mcnemar_p:.2f}"]
    return [*row, _verdict(stage.passed)]


def _verdict(passed: bool) -> Html:
    return tag("span", "pass" if passed else "FAIL", class_="good" if passed else "bad")
