"""A parity report as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployfa.parity.report import GreedyComparison, ParityReport

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["render"]


def _gap(found: GreedyComparison) -> str:
    """Why two tokens, or why it is not known."""
    if found.our_gap is None or found.their_gap is None:
        return "one of the two had ended"
    why = "noise can close that" if found.explained else "more than noise"
    return f"the candidates' logits {found.our_gap:.1e} apart here and {found.their_gap:.1e} in PyTorch: {why}"


def render(report: ParityReport) -> list[RenderableType]:
    """One row per stage, then the verdict in one line."""
    from rich.table import Table
    from rich.text import Text

    of = f"'{report.bundle}'" + "".join(
        f" with '{each}'" for each in (report.patch, report.adapter) if each is not None
    )
    table = Table(title=f"Parity of {of} against {report.truth}, {report.rows} rows")
    table.add_column("stage")
    columns = ["error / ‖truth‖", "error / noise", "max abs error (logits)", "error / adapter's effect", "label flips"]
    with_accuracy = any(stage.accuracy is not None for stage in report.stages)
    for column in [*columns, *(["accuracy (%)", "McNemar p"] if with_accuracy else [])]:
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for stage in report.stages:
        effect = f"{stage.effect_error:.1e}" if stage.effect_error is not None else "–"
        error, ratio, largest = (
            "∞" if value is None else format(value, form)
            for value, form in ((stage.error, ".2e"), (stage.noise_ratio, ".2f"), (stage.max_abs, ".1e"))
        )
        figures = [error, ratio, largest, effect, str(stage.flips)]
        if with_accuracy and stage.accuracy is not None and stage.mcnemar_p is not None:
            figures += [f"{100 * stage.accuracy:.2f}", f"{stage.mcnemar_p:.2f}"]
        table.add_row(stage.name, *figures, "pass" if stage.passed else "FAIL")
    noise = (
        f"noise (float32 against float64, same model, same rows, largest of several runs): {report.noise:.2e} of "
        f"‖truth‖; the adapter's own effect: {report.effect:.2f} of ‖truth‖"
    )
    if report.tokens_longest:
        noise += f"; longest row {report.tokens_longest} tokens"
    if report.truth_accuracy is not None:
        noise += f"; accuracy of the truth {100 * report.truth_accuracy:.2f} %"
    if (found := report.perplexity) is not None:
        truth, deployed = ("∞" if each is None else f"{each:.4f}" for each in (found.truth, found.deployed))
        difference = "∞" if found.difference is None else f"{100 * found.difference:+.4f}"
        noise += (
            f"; perplexity of {found.tokens:,} tokens: PyTorch {truth}, the bundle {deployed} "
            f"({difference} %, limit {100 * found.limit:g} %)"
        )
    if (greedy := report.greedy) is not None:
        noise += (
            f"; {greedy.equal} of {greedy.prompts} prompts go on with the same tokens as PyTorch's generate, "
            f"{greedy.max_new_tokens} each at most"
        )
        for each in greedy.comparisons:
            if each.position is not None:
                noise += f"\n'{each.prompt}': token {each.position + 1} differs, {_gap(each)}"
    verdict = Text(f"{'PASS' if report.passed else 'FAIL'}: {report.reason}", style="green" if report.passed else "red")
    return [table, noise, verdict]
