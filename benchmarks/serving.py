"""What serving costs: over a bare session, under load, and with a thousand adapters that come and go.

    python benchmarks/serving.py --out benchmarks/results

- overhead: one client, one request at a time, 1x16; blocks of 15 alternate with the same session in this process.
- saturated: 16 clients, 16 adapters, each sends as soon as it is answered; rounds alternate with a bare session that
  runs batches of the sizes that the server made, and with a server that takes one request at a time.
- fleet: 1,000 adapters, 300 of them in memory, Zipf traffic at a fixed rate, adapters added, replaced and removed all
  the time; every answer is held against the folded graph of its own adapter.

Real MiniLM, random adapters of a trained one's size, runtime spinning off, the load of the machine recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from many_adapters import adapter, cores, fed, text_feeds
from serving_client import Server, closed_loop, connect, request
from serving_fleet import fleet
from serving_table import markdown

from deployfa.bench.machine import describe_machine
from deployfa.bundle import Bundle
from deployfa.bundle.open_engine import open_bundle
from deployfa.mixed import MixedRunner, open_table
from deployfa.pack import pack
from deployfa.pipeline import export

PARTS = ("overhead", "saturated", "fleet")
CLIENTS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="The folder of serving.json and serving.md.")
    parser.add_argument("--only", choices=PARTS, action="append", help="Measure this part anew, keep the others.")
    parser.add_argument("--rounds", type=int, default=5, help="Of the saturated part.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Of the fleet part.")
    parser.add_argument("--adapters", type=int, default=1000, help="Of the fleet part.")
    parser.add_argument("--rate", type=float, default=120.0, help="Requests per second of the fleet part.")
    parser.add_argument("--truths", type=Path, help="Keep what the adapters must answer here; read if it is there.")
    options = parser.parse_args()
    file = options.out / "serving.json"
    report: dict[str, Any] = json.loads(file.read_text()) if options.only and file.is_file() else {"parts": {}}
    measures: dict[str, Callable[[Path, Any], Any]] = {"overhead": overhead, "saturated": saturated, "fleet": fleet}
    for part in options.only or PARTS:
        print(f"{part} …", flush=True)
        with tempfile.TemporaryDirectory(prefix="deployfa-serving-") as scratch:
            machine = msgspec.to_builtins(describe_machine())
            report["parts"][part] = {"machine": machine, "results": measures[part](Path(scratch), options)}
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (options.out / "serving.md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))


def overhead(folder: Path, options: Any) -> list[dict[str, Any]]:
    own = {f"vefa-{number}": adapter("vefa", number) for number in range(CLIENTS)}
    folded = export(own["vefa-0"], folder / "folded").bundle
    packed = pack(own, folder / "pack", table_inputs=True).bundle
    feeds = text_feeds(1, 16)
    found = []
    with Server({"folded": folded.path, "pack": packed.path}, "--threads", cores()) as server:
        for model, bundle in (("folded", folded), ("pack", packed)):
            run = bare(bundle)
            raw = request(model, fed(feeds, run.runner), adapter="vefa-0" if model == "pack" else None)
            found.append({"model": model, **asyncio.run(alternated(server.port, raw, lambda run=run: run(feeds, 1)))})
    return found


async def alternated(port: int, raw: bytes, run: Callable[[], Any]) -> dict[str, Any]:
    """Blocks of 15 by turns; the overhead of a round is the difference of its medians."""
    connection = await connect(port)
    for _ in range(100):
        await connection.ask(raw)
        run()
    served: list[list[float]] = []
    alone: list[list[float]] = []
    for _ in range(60):
        blocks: tuple[list[float], list[float]] = ([], [])
        for _ in range(15):
            start = time.perf_counter()
            status, body = await connection.ask(raw)
            blocks[0].append(1e3 * (time.perf_counter() - start))
            assert status == 200, body
        for _ in range(15):
            start = time.perf_counter()
            run()
            blocks[1].append(1e3 * (time.perf_counter() - start))
        served.append(blocks[0])
        alone.append(blocks[1])
    rounds = np.array([np.median(s) - np.median(a) for s, a in zip(served, alone, strict=True)])
    drawn = np.random.default_rng(0).integers(0, len(rounds), (2000, len(rounds)))
    low, high = np.quantile(np.median(rounds[drawn], axis=1), (0.025, 0.975))
    return {
        "served_p50_ms": float(np.median(served)),
        "served_p99_ms": float(np.quantile(served, 0.99)),
        "bare_p50_ms": float(np.median(alone)),
        "bare_p99_ms": float(np.quantile(alone, 0.99)),
        "overhead_ms": float(np.median(served) - np.median(alone)),
        "overhead_low_ms": float(low),
        "overhead_high_ms": float(high),
        "samples": int(np.size(served)),
    }


def saturated(folder: Path, options: Any) -> list[dict[str, Any]]:
    own = {f"vefa-{number}": adapter("vefa", number) for number in range(CLIENTS)}
    packed = pack(own, folder / "pack", table_inputs=True).bundle
    run = bare(packed)
    found = []
    models = {"pack": packed.path}
    with (
        Server(models, "--threads", cores()) as server,
        Server(models, "--threads", cores(), "--max-batch", 1) as single,
    ):
        for length in (8, 16, 64, 128):
            feeds = fed(text_feeds(1, length), run.runner)
            raws = [request("pack", feeds, adapter=name) for name in own]
            rounds = []
            for _ in range(options.rounds):
                before = server.batches("pack")
                rate, latencies = asyncio.run(closed_loop(server.port, raws, 5.0, 0.5))
                after = server.batches("pack")
                sizes = {rows: count - before.get(rows, 0) for rows, count in after.items()}
                alone = bare_rate(run, length, {rows: count for rows, count in sizes.items() if count}, 4.0)
                one_by_one, _ = asyncio.run(closed_loop(single.port, raws, 3.0, 0.5))
                largest = bare_rate(run, length, {CLIENTS: 1}, 2.0) / bare_rate(run, length, {1: 1}, 2.0)
                mean = sum(rows * count for rows, count in sizes.items()) / sum(sizes.values())
                rounds.append((rate, rate / alone, rate / one_by_one, mean, statistics.median(latencies), largest))
            columns = [[each[index] for each in rounds] for index in range(6)]
            found.append(
                {
                    "length": length,
                    "rate": statistics.median(columns[0]),
                    "over_bare": _spread(columns[1]),
                    "over_one_by_one": _spread(columns[2]),
                    "mean_batch": statistics.median(columns[3]),
                    "p50_ms": statistics.median(columns[4]),
                    "bare_16_over_1": _spread(columns[5]),
                    "rounds": options.rounds,
                }
            )
            print(found[-1], flush=True)
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


class bare:
    """A session of ``bundle`` in this process; a call runs ``rows`` copies of one row, each with another adapter."""

    def __init__(self, bundle: Bundle) -> None:
        tables = bundle.manifest.tables
        self.names: list[str] = []
        if tables is not None:
            table = open_table(bundle)
            self.runner: Any = MixedRunner(bundle, table, threads=cores(), spinning=False)
            self.names = table.names()[1:]
        else:
            self.runner = open_bundle(bundle, "onnxruntime-cpu", threads=cores(), spinning=False)

    def __call__(self, feeds: dict[str, np.ndarray], rows: int) -> Any:
        wanted = fed(feeds, self.runner)
        if not self.names:
            return self.runner.run(wanted)
        return self.runner.run(wanted, [self.names[row % len(self.names)] for row in range(rows)])


def bare_rate(run: bare, length: int, sizes: dict[int, int], seconds: float) -> float:
    """Rows per second of batches of these sizes, in a random order."""
    order = np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values())))
    batches = {rows: text_feeds(rows, length) for rows in sizes}
    for rows, feeds in batches.items():
        run(feeds, rows)
    start, done, turn = time.perf_counter(), 0, 0
    while time.perf_counter() - start < seconds:
        rows = int(order[turn % len(order)])
        run(batches[rows], rows)
        done, turn = done + rows, turn + 1
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
