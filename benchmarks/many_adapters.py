"""Many adapters on one model: what slots and tables cost, and against what people do today.

    python benchmarks/many_adapters.py --out benchmarks/results

MiniLM, every one of its 36 encoder linears adapted and a head of two labels, random values, float32, all cores.

- ``idle``: the slot bundle with no adapter, against the base graph;
- ``mixed``: a batch of 16 adapters, against the same batch on one folded adapter;
- ``rivals``: the same LoRA adapters in PEFT's mixed batches, in one session per adapter, and swapped in row by row;
- ``resident``: 10,000 adapters in memory, against 16;
- ``swap``: from an adapter in memory to the first answer with it, less one inference.

``idle`` and ``mixed`` are ``deployfa.bench``'s: a process per contender, interleaved.  The others alternate in random
order in one process, spinning off, because what they compare shares memory; ratios are of medians, round by round.
Each part is written when it is done; ``--only PART`` measures some anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from many_adapters_table import draw, markdown

from deployfa.adapter import Adapter, BaseReference
from deployfa.assets import fetch
from deployfa.base_graphs import base_graph
from deployfa.bench import Contender, Shape, bench
from deployfa.bench.machine import describe_machine
from deployfa.bench.statistics import median_ratio
from deployfa.bundle.open_engine import open_slots
from deployfa.edits import Array, Edit, LowRank
from deployfa.graph.optimize import fuse
from deployfa.graph.row_layout import base_heads, base_weights, make_layout
from deployfa.graph.storage import save_graph
from deployfa.mixed import MixedRunner, open_table
from deployfa.pack import pack
from deployfa.pipeline import export
from deployfa.runtimes.onnxruntime import OnnxRuntimeRunner
from deployfa.slots import export_slots, slot_row
from deployfa.tables import AdapterTable, Member, base_row, open_fleet, row_of, write_fleet

PARTS = ("idle", "mixed", "rivals", "resident", "swap")
DISTINCT = 16
RESIDENT = 10_000
SITES = {
    f"bert.encoder.layer.{layer}.{name}": sizes
    for layer in range(6)
    for name, sizes in {
        "attention.self.query": (384, 384),
        "attention.self.key": (384, 384),
        "attention.self.value": (384, 384),
        "attention.output.dense": (384, 384),
        "intermediate.dense": (384, 1536),
        "output.dense": (1536, 384),
    }.items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="The folder of many_adapters.json, .md and .svg.")
    parser.add_argument("--only", choices=PARTS, action="append", help="Measure this part anew, keep the others.")
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=90.0, help="The most for one shape of one comparison.")
    options = parser.parse_args()
    file = options.out / "many_adapters.json"
    report: dict[str, Any] = json.loads(file.read_text()) if options.only and file.is_file() else {"parts": {}}
    with tempfile.TemporaryDirectory(prefix="deployfa-many-") as scratch:
        for part in options.only or PARTS:
            print(f"{part} …", flush=True)
            made = Path(scratch) / part
            made.mkdir()
            machine = msgspec.to_builtins(describe_machine())
            report["parts"][part] = {"machine": machine, "results": MEASURES[part](made, options)}
            shutil.rmtree(made)
            options.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (options.out / "many_adapters.md").write_text(markdown(report), encoding="utf-8")
    (options.out / "many_adapters.svg").write_text(draw(report), encoding="utf-8")
    print(markdown(report))


def adapter(method: str, seed: int) -> Adapter:
    """Random values of a trained adapter's size."""
    random = np.random.default_rng((1, seed))

    def numbers(*shape: int, scale: float) -> Array:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    def edit(k: int, d: int) -> Edit:
        if method == "vefa":
            return Edit(lam=numbers(k, scale=0.1))
        width = k if method == "lorfa" else d
        low = LowRank(numbers(8, k, scale=k**-0.5), numbers(width, 8, scale=0.05), 2.0)
        return Edit(input_low_rank=low) if method == "lorfa" else Edit(output_low_rank=low)

    head = {"weight": numbers(2, 384, scale=0.05), "bias": numbers(2, scale=0.1)}
    made = Adapter(
        method,
        {site: edit(*sizes) for site, sizes in SITES.items()},
        {"classifier": head},
        base=BaseReference(name=str(fetch("minilm"))),
        labels=("negative", "positive"),
    )
    return replace(made, base=msgspec.structs.replace(made.base, fingerprint=base_graph(made).fingerprint))


def adapters(method: str, count: int = DISTINCT) -> dict[str, Adapter]:
    return {f"{method}-{number}": adapter(method, number) for number in range(count)}


def idle(folder: Path, options: Any) -> list[dict[str, Any]]:
    """Slots without an adapter against the base graph with the same fusion; with and without the idle branch."""
    shapes = [Shape(1, 16), Shape(1, 128), Shape(8, 128)]
    own = adapter("vefa", 0)
    graph = base_graph(own).load()
    branch = export_slots(own, folder / "branch", shapes=shapes).bundle
    plain = export_slots(own, folder / "plain", shapes=shapes, idle_branch=False).bundle
    base = folder / "base"
    base.mkdir()
    save_graph(fuse(graph, branch.manifest.optimization.chosen), base)
    contenders = [
        Contender(label="base", graph=base / "model.onnx"),
        Contender(label="slots, idle branch", graph=branch.graph),
        Contender(label="slots, no branch", graph=plain.graph),
    ]
    return compared(contenders, shapes, options)


def mixed(folder: Path, options: Any) -> list[dict[str, Any]]:
    """16 rows of 16 adapters against 16 rows of one folded adapter, each with the fusion that is best for it."""
    shapes = [Shape(DISTINCT, 32), Shape(DISTINCT, 128)]
    found: list[dict[str, Any]] = []
    for method in ("vefa", "lorfa", "lora"):
        own = adapters(method)
        folded = export(own[f"{method}-0"], folder / f"{method}-folded", shapes=shapes).bundle
        packed = pack(own, folder / f"{method}-pack", shapes=shapes, table_inputs=True).bundle
        contenders = [
            Contender(label=f"{method}, one folded", graph=folded.graph),
            Contender(
                label=f"{method}, {DISTINCT} mixed",
                graph=packed.graph,
                adapters=DISTINCT,
                fleet=packed.path / "adapters.safetensors",
            ),
        ]
        found += compared(contenders, shapes, options)
    return found


def compared(contenders: Sequence[Contender], shapes: Sequence[Shape], options: Any) -> list[dict[str, Any]]:
    report = bench(
        contenders,
        shapes,
        spinning="both",
        launches=options.launches,
        min_samples=options.samples,
        max_seconds_per_shape=options.seconds,
        flops=False,
        bare_matmul=False,
    )
    memory = {each.label: each.peak_memory_bytes for each in report.contenders}
    kept = ("contender", "batch", "sequence", "spinning", "samples", "p50_ms", "ratio", "ratio_low", "ratio_high")
    return [
        {**{name: getattr(result, name) for name in kept}, "peak_memory_bytes": memory[result.contender]}
        for result in report.results
    ]


def rivals(folder: Path, options: Any) -> list[dict[str, Any]]:
    """The same 16 LoRA adapters, r = 8, one a row: rows per second of the four ways."""
    own = adapters("lora")
    # one head for all: PEFT's mixed batches do not mix modules_to_save
    head = own["lora-0"].modules
    own = {name: replace(each, modules=head) for name, each in own.items()}
    packed = pack(own, folder / "pack", table_inputs=True, shapes=[Shape(DISTINCT, 32)]).bundle
    mix = MixedRunner(packed, threads=cores())
    first = next(iter(own.values()))
    sessions = {}
    for name, each in own.items():
        graph = export(each, folder / name, optimize="ort").bundle.graph
        sessions[name] = OnnxRuntimeRunner(graph, threads=cores(), spinning=False)
    slots = export_slots(first, folder / "slots", shapes=[Shape(1, 32)]).bundle
    runner = open_slots(slots, threads=cores(), spinning=False)
    swapped = {name: runner.load(slot_row(slots, each)) for name, each in own.items()}
    peft = peft_model(own)
    names = list(own)
    found = []
    for sequence in (8, 32, 128):
        feeds = text_feeds(DISTINCT, sequence)
        rows = [{name: array[number : number + 1] for name, array in feeds.items()} for number in range(DISTINCT)]
        ways: dict[str, Callable[[], Array]] = {
            "mixed batch": lambda feeds=feeds: mix.run(fed(feeds, mix), names)["logits"],
            "one session per adapter": lambda rows=rows: np.concatenate(
                [sessions[n].run(fed(row, sessions[n]))["logits"] for n, row in zip(names, rows, strict=True)]
            ),
            "swapped in row by row": lambda rows=rows: np.concatenate(
                [runner.run(fed(row, runner), swapped[n])["logits"] for n, row in zip(names, rows, strict=True)]
            ),
            "PEFT, adapter_names": lambda feeds=feeds: peft(feeds, names),
        }
        answers = {way: run() for way, run in ways.items()}
        scale = np.linalg.norm(answers["mixed batch"])
        for way, answer in answers.items():
            error = float(np.linalg.norm(answer - answers["mixed batch"]) / scale)
            # four float32 ways of one computation; a wrong adapter would be off by tenths
            assert error < 1e-4, f"{way} answers something else: {error:.1e}"
        found += alternated(ways, options, batch=DISTINCT, sequence=sequence)
    return found


def peft_model(own: dict[str, Adapter]) -> Callable[[dict[str, Array], Sequence[str]], Array]:
    """PEFT with every adapter of ``own`` loaded, and the head that they share."""
    import peft
    import torch
    import transformers

    first = next(iter(own.values()))
    torch.set_num_threads(cores())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(first.base.name, num_labels=2)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=r".*encoder\.layer\..*(query|key|value|dense)")
    wrapped = peft.get_peft_model(model, config, adapter_name=next(iter(own)))
    for name in list(own)[1:]:
        wrapped.add_adapter(name, config)
    modules = dict(wrapped.base_model.model.named_modules())
    with torch.no_grad():
        for name, each in own.items():
            for site, edit in each.edits.items():
                low = edit.output_low_rank
                assert low is not None and modules[site].scaling[name] == low.s
                modules[site].lora_A[name].weight.copy_(torch.from_numpy(low.a))
                modules[site].lora_B[name].weight.copy_(torch.from_numpy(low.b))
        for parameter, array in first.modules["classifier"].items():
            getattr(modules["classifier"], parameter).copy_(torch.from_numpy(np.array(array)))
    wrapped.eval()

    def run(feeds: dict[str, Array], names: Sequence[str]) -> Array:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
            answer: Array = wrapped(**tensors, adapter_names=list(names)).logits.numpy()
            return answer

    return run


def resident(folder: Path, options: Any) -> list[dict[str, Any]]:
    """One session, batches of 16 rows of different adapters, drawn anew for every run from 16 or from 10,000."""
    own = adapters("vefa")
    packed = pack(own, folder / "pack", table_inputs=True, shapes=[Shape(DISTINCT, 32)]).bundle
    graph = base_graph(own["vefa-0"]).load()
    layout = make_layout(graph, own)
    zero = base_row(layout, base_heads(graph, layout))
    members = [Member(name="base", method="base")]
    members += [Member(name=f"a{number}", method="vefa") for number in range(RESIDENT)]
    random = np.random.default_rng(2)
    some = [row_of(each, layout, zero, weights=base_weights(graph, layout)) for each in own.values()]

    def rows():  # type: ignore[no-untyped-def]
        yield zero
        for number in range(RESIDENT):
            row = dict(some[number % DISTINCT])
            row["adapter/lambda"] = (0.1 * random.standard_normal(row["adapter/lambda"].shape)).astype(np.float32)
            yield row

    fleet_file = folder / "fleet.safetensors"
    write_fleet(fleet_file, layout, members, rows())
    before = resident_bytes()
    start = time.perf_counter()
    table = AdapterTable.from_fleet(open_fleet(fleet_file), max_adapters=RESIDENT + 16)
    seconds = time.perf_counter() - start
    grown = resident_bytes() - before
    raw = (RESIDENT + 1) * layout.row_bytes
    mix = MixedRunner(packed, table, threads=cores())
    found: list[dict[str, Any]] = [
        {"raw_bytes": raw, "memory_bytes": grown, "memory_ratio": grown / raw, "load_seconds": seconds}
    ]
    for sequence in (32, 128):
        feeds = fed(text_feeds(DISTINCT, sequence), mix)

        def batch(many: int, feeds: dict[str, Array] = feeds) -> Array:
            numbers = random.choice(many, DISTINCT, replace=False)
            return mix.run(feeds, [f"a{number}" for number in numbers])["logits"]

        ways: dict[str, Callable[[], Array]] = {
            "16 resident": lambda: batch(DISTINCT),
            f"{RESIDENT:,} resident": lambda: batch(RESIDENT),
        }
        found += alternated(ways, options, batch=DISTINCT, sequence=sequence)
    return found


def swap(folder: Path, options: Any) -> list[dict[str, Any]]:
    """(New adapter → first answer) − the same inference with an adapter that is there; one row of 16 tokens."""
    own = adapters("vefa")
    found = []
    packed = pack(own, folder / "pack", table_inputs=True, shapes=[Shape(1, 16)]).bundle
    table = open_table(packed, max_adapters=64)
    mix = MixedRunner(packed, table, threads=cores())
    feeds = fed(text_feeds(1, 16), mix)
    fresh = list(own.values())
    name = next(iter(own))
    slots = export_slots(fresh[0], folder / "slots", shapes=[Shape(1, 16)]).bundle
    runner = open_slots(slots, threads=cores(), spinning=False)
    slot_feeds = fed(text_feeds(1, 16), runner)
    prepared = [slot_row(slots, each) for each in fresh]
    last = runner.load(prepared[0])
    seconds: dict[str, list[tuple[float, float]]] = {"tables": [], "slots": []}
    for number in range(options.samples + 10):
        new = fresh[number % DISTINCT]
        start = time.perf_counter()
        table.replace(name, new)
        mix.run(feeds, [name])
        first = time.perf_counter()
        mix.run(feeds, [name])
        seconds["tables"].append((first - start, time.perf_counter() - first))
        start = time.perf_counter()
        last = runner.load(prepared[number % DISTINCT])
        runner.run(slot_feeds, last)
        first = time.perf_counter()
        runner.run(slot_feeds, last)
        seconds["slots"].append((first - start, time.perf_counter() - first))
    for way, pairs in seconds.items():
        once = np.array(pairs[10:])
        extra = 1e3 * (once[:, 0] - np.median(once[:, 1]))
        low, high = bootstrap(extra)
        found.append(
            {
                "way": way,
                "samples": len(extra),
                "extra_ms": float(np.median(extra)),
                "extra_ms_low": low,
                "extra_ms_high": high,
                "inference_ms": 1e3 * float(np.median(once[:, 1])),
            }
        )
    return found


def alternated(
    ways: dict[str, Callable[[], Array]], options: Any, *, batch: int, sequence: int
) -> list[dict[str, Any]]:
    """Rounds of all ways in random order; the ratio is to the first."""
    for run in ways.values():
        run()
        run()
    random = np.random.default_rng(0)
    samples: dict[str, list[float]] = {way: [] for way in ways}
    end = time.perf_counter() + options.seconds
    while len(next(iter(samples.values()))) < options.samples and time.perf_counter() < end:
        for way in random.permutation(list(ways)):
            start = time.perf_counter()
            ways[way]()
            samples[way].append(time.perf_counter() - start)
    first = next(iter(ways))
    # rounds in five blocks, as if of five launches
    blocks = {way: np.array_split(1e3 * np.array(times)[:, None], 5) for way, times in samples.items()}
    found = []
    for way, times in samples.items():
        interval = None if way == first else median_ratio(blocks[way], blocks[first], seed=0)
        median = float(np.median(times))
        found.append(
            {
                "way": way,
                "batch": batch,
                "sequence": sequence,
                "samples": len(times),
                "p50_ms": 1e3 * median,
                "rows_per_s": batch / median,
                "ratio": None if interval is None else interval.estimate,
                "ratio_low": None if interval is None else interval.low,
                "ratio_high": None if interval is None else interval.high,
            }
        )
    return found


def bootstrap(values: Array) -> tuple[float, float]:
    """The 95 % interval of a median."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def text_feeds(batch: int, sequence: int) -> dict[str, Array]:
    random = np.random.default_rng((3, sequence))
    ids = random.integers(1000, 20_000, (batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def fed(feeds: dict[str, Array], runner: Any) -> dict[str, Array]:
    return {spec.name: feeds[spec.name] for spec in runner.inputs}


def cores() -> int:
    return len(os.sched_getaffinity(0))


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


MEASURES: dict[str, Callable[[Path, Any], list[dict[str, Any]]]] = {
    "idle": idle,
    "mixed": mixed,
    "rivals": rivals,
    "resident": resident,
    "swap": swap,
}

if __name__ == "__main__":
    main()
