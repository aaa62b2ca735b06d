"""SmolLM2-135M with an adapter: time to the first token and tokens a second, against PyTorch's ``generate``.

``python benchmarks/generation.py --out benchmarks/results`` writes ``generation.json`` and ``generation.md``.  The
adapter is a VeFA on every layer, drawn: what it says does not change what it costs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from deployfa.adapter import Adapter, BaseReference
from deployfa.atomic import write_file
from deployfa.base_models import base_model
from deployfa.bench import Shape
from deployfa.edits import Edit
from deployfa.generation.timing import GenerationContender, time_generation
from deployfa.generation.timing_report import GenerationBench, ratio_text
from deployfa.pipeline import export
from deployfa.slots import export_slots

__all__ = ["drawn_adapter", "main", "markdown"]


def drawn_adapter(folder: Path, *, scale: float = 0.02, seed: int = 0) -> Adapter:
    """λ of every linear layer of the blocks of the model in ``folder``."""
    from deployfa.training.base import base_fingerprint, load_base

    base = load_base(folder, "text-generation", labels=None)
    random = np.random.default_rng(seed)
    edits = {
        name: Edit(lam=(scale * random.standard_normal(module.in_features)).astype(np.float32))
        for name, module in base.model.named_modules()
        if type(module).__name__ == "Linear" and "layers" in name
    }
    reference = BaseReference(
        name=str(folder),
        fingerprint=base_fingerprint(base.model),
        architecture=base.architecture,
        task="text-generation",
    )
    return Adapter(method="vefa", edits=edits, base=reference)


def markdown(report: GenerationBench) -> str:
    """The tables of ``generation.md``."""
    settings, machine = report.settings, report.machine
    names = [each.label for each in report.contenders]
    lines = [
        "# Generation",
        "",
        f"SmolLM2-135M, float32, greedy, {settings.new_tokens} new tokens, {settings.threads} threads, spinning "
        f"{'on' if settings.spinning else 'off'}; {settings.launches} launches of {settings.rounds} rounds each. "
        f"{machine.cpu}, {machine.cores} cores. Ratios are of times, to {names[0]}, with their 95 % interval.",
        "",
        "| batch x prompt | | first token, ms | ratio | tokens/s | ratio of a step | same tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in report.results:
        lines.append(
            f"| {each.batch}x{each.prompt_tokens} | {each.contender} | {each.ttft_ms:.1f} | "
            f"{ratio_text(each.ttft_ratio, each)} | {each.tokens_per_second:.1f} | "
            f"{ratio_text(each.token_ratio, each)} | {'yes' if each.same_tokens else 'no'} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines += ["", f"Python {machine.python}, {versions}.", *(f"\nWarning: {warning}" for warning in report.warnings)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", default="1x32,4x32,16x32", help="BATCHxPROMPT,...")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    folder = base_model("smollm2", progress=print)
    adapter = drawn_adapter(folder)
    with tempfile.TemporaryDirectory(prefix="deployfa-generation-") as scratch:
        place = Path(scratch)
        adapter.save(place / "adapter.safetensors")
        made = {
            "folded": export(adapter, place / "folded.bundle", optimize="none", status=print).bundle,
            "slots": export_slots(adapter, place / "slots.bundle", optimize="none", status=print).bundle,
        }
        contenders = [
            GenerationContender("PyTorch eager", "torch", adapter=place / "adapter.safetensors", model=str(folder)),
            *(GenerationContender(name, bundle=bundle.path) for name, bundle in made.items()),
        ]
        report = time_generation(
            contenders,
            [Shape.parse(text) for text in options.shapes.split(",")],
            new_tokens=options.new_tokens,
            threads=options.threads,
            launches=options.launches,
            rounds=options.rounds,
            vocabulary=49152,
            progress=lambda what, share: print(f"{100 * share:.0f} % {what}", flush=True),
        )
    # what lay in a scratch folder is gone
    kept = [msgspec.structs.replace(each, bundle=None) for each in report.contenders]
    report = msgspec.structs.replace(report, contenders=kept)
    options.out.mkdir(parents=True, exist_ok=True)
    with write_file(options.out / "generation.json", force=True) as partial:
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    with write_file(options.out / "generation.md", force=True) as partial:
        partial.write_text(markdown(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
