"""The three tasks of the method's paper, deployed: parity and latency of every form of one trained adapter each.

    python benchmarks/tasks.py --text vefa.pt --pictures digits.pt --language movies-lm.pt --out benchmarks/results

The adapters are those that the README's commands train.  Each is exported folded, as side ops and with slots, held
against its base model in float64 (the reference that the bundle stores), and timed, interleaved, against its base graph
with the same head.  Of the language model a run is one new token after so many that were read.  Writes ``tasks.json``
and ``tasks.md``; a part that is measured anew leaves the others as they are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec

from deployfa.adapter import Adapter
from deployfa.atomic import write_file
from deployfa.bench import Contender, Shape, bench
from deployfa.bench.machine import Machine
from deployfa.bundle import Bundle
from deployfa.parity import verify
from deployfa.pipeline import export, fused_base
from deployfa.slots import export_slots

__all__ = ["FORMS", "Row", "TaskReport", "main", "markdown"]

FORMS = ("folded", "side op", "slots")
#: Option → the model, and the shapes that it is timed at.
TASKS = {
    "text": ("MiniLM, text-classification", (Shape(1, 128), Shape(8, 128))),
    "pictures": ("EfficientNet-Lite0, image-classification", (Shape(1), Shape(8))),
    "language": ("SmolLM2-135M, text-generation", (Shape(1, 128), Shape(4, 128))),
}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One form at one shape.  error: normwise relative to float64, noise_ratio: over float32's own.  ratio: to the base
    graph's latency, with its 95 % interval."""

    form: str
    error: float | None
    noise_ratio: float | None
    flips: int
    rows: int
    passed: bool
    shape: str
    p50_ms: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


class TaskReport(msgspec.Struct, frozen=True, kw_only=True):
    """scores: of training, as the adapter carries them.  base_p50_ms: shape → the base's own."""

    model: str
    method: str
    sites: int
    folded_edits: int
    parameters: int
    scores: dict[str, dict[str, float | int | None]]
    base_p50_ms: dict[str, float]
    rows: list[Row]
    machine: Machine


def measure(part: str, file: Path, *, seconds: float, launches: int) -> TaskReport:
    """Export, verify and time the adapter in ``file``."""
    model, shapes = TASKS[part]
    adapter = Adapter.load(file)
    with tempfile.TemporaryDirectory(prefix="deployfa-tasks-") as scratch:
        folder = Path(scratch)
        folded = export(adapter, folder / "folded", shapes=shapes)
        fusion = folded.bundle.manifest.optimization.chosen
        # the same fusion for all: what is compared is the placement
        bundles: dict[str, Bundle] = {
            "folded": folded.bundle,
            "side op": export(adapter, folder / "side-op", placement="side-op", optimize=fusion).bundle,
            "slots": export_slots(adapter, folder / "slots", optimize=fusion).bundle,
        }
        reports = {form: verify(bundle, use_torch=False) for form, bundle in bundles.items()}
        (folder / "base").mkdir()
        base = Contender(label="base", graph=fused_base(folded.bundle, folder / "base"))
        contenders = [
            Contender(label=form, graph=bundle.graph, bundle=bundle.path, target=bundle.manifest.target)
            for form, bundle in bundles.items()
        ]
        timed = bench(
            [base, *contenders],
            shapes,
            launches=launches,
            max_seconds_per_shape=seconds,
            flops=False,
            bare_matmul=False,
        )
    rows = []
    for result in timed.results:
        if result.contender == "base" or result.p50_ms is None:
            continue
        report = reports[result.contender]
        deployed = report.stages[-1]
        rows.append(
            Row(
                form=result.contender,
                error=deployed.error,
                noise_ratio=deployed.noise_ratio,
                flips=deployed.flips,
                rows=report.rows,
                passed=report.passed,
                shape=f"{result.batch}x{result.sequence}",
                p50_ms=result.p50_ms,
                ratio=result.ratio,
                ratio_low=result.ratio_low,
                ratio_high=result.ratio_high,
            )
        )
    return TaskReport(
        model=model,
        method=adapter.method,
        sites=len(adapter.edits),
        folded_edits=folded.plan.folded,
        parameters=adapter.parameters,
        scores=adapter.training.get("scores", {}),
        base_p50_ms={f"{r.batch}x{r.sequence}": r.p50_ms or 0.0 for r in timed.results if r.contender == "base"},
        rows=rows,
        machine=timed.machine,
    )


def markdown(reports: dict[str, TaskReport]) -> str:
    """``tasks.md``: one table for all tasks."""
    lines = [
        "# The three tasks, deployed",
        "",
        "Error: normwise, of the deployed graph against float64, relative to it and to the model's own float32 noise "
        "(limit 2x). Ratio: of the median latency to the base graph's with the same head, with its 95 % interval. Of "
        "the language model a run is one token after 128. Slots are judged with the adapter in them and timed without "
        "one: active, they are side ops.",
        "",
        "| task | form | error | error / noise | flips | verdict | shape | p50 (ms) | base (ms) | ratio |",
        "|---|---|---:|---:|---:|---|---|---:|---:|---:|",
    ]
    for report in reports.values():
        for row in sorted(report.rows, key=lambda row: (FORMS.index(row.form), row.shape)):
            error = "–" if row.error is None else f"{row.error:.1e}"
            noise = "–" if row.noise_ratio is None else f"{row.noise_ratio:.2f}"
            interval = "" if row.ratio_low is None else f" [{row.ratio_low:.3f}, {row.ratio_high:.3f}]"
            ratio = "–" if row.ratio is None else f"{row.ratio:.3f}{interval}"
            figures = (error, noise, f"{row.flips} of {row.rows}", "pass" if row.passed else "FAIL", row.shape)
            times = (f"{row.p50_ms:.2f}", f"{report.base_p50_ms[row.shape]:.2f}", ratio)
            lines.append(f"| {report.model} | {row.form} | {' | '.join((*figures, *times))} |")
    lines += [""]
    for report in reports.values():
        scores = "; ".join(f"{name}: {_score(found)}" for name, found in report.scores.items())
        lines.append(
            f"- {report.model}: {report.method}, {report.parameters:,} parameters at {report.sites} sites, "
            f"{report.folded_edits} of them folded. {scores}."
        )
        busy = ", busy with other things" if report.machine.busy else ""
        lines.append(f"  {report.machine.cpu}, {report.machine.cores} cores{busy}.")
    return "\n".join(lines) + "\n"


def _score(found: dict[str, float | int | None]) -> str:
    if found.get("perplexity") is not None:
        return f"perplexity {found['perplexity']:.2f} (base {found.get('base') or 0:.2f})"
    return f"balanced accuracy {100 * (found.get('balanced_accuracy') or 0):.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part, (model, _) in TASKS.items():
        parser.add_argument(f"--{part}", type=Path, help=f"The adapter of {model}.")
    parser.add_argument("--out", type=Path, required=True, help="The folder of tasks.json and tasks.md.")
    parser.add_argument("--seconds", type=float, default=40.0, help="Per shape, all forms together.")
    parser.add_argument("--launches", type=int, default=3, help="Processes of each form.")
    options = parser.parse_args()
    file = options.out / "tasks.json"
    reports = msgspec.json.decode(file.read_bytes(), type=dict[str, TaskReport]) if file.is_file() else {}
    for part in TASKS:
        given: Path | None = getattr(options, part)
        if given is not None:
            print(f"{part} …", file=sys.stderr, flush=True)
            reports[part] = measure(part, given, seconds=options.seconds, launches=options.launches)
    reports = {part: reports[part] for part in TASKS if part in reports}
    options.out.mkdir(parents=True, exist_ok=True)
    with write_file(file, force=True) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(reports)))
    with write_file(options.out / "tasks.md", force=True) as partial:
        partial.write_text(markdown(reports), encoding="utf-8")
    print(markdown(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
