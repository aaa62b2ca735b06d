"""What an adapter costs on one NVIDIA GPU, in every runtime that is installed, and how fast it is trained there.

    python benchmarks/gpu.py --out benchmarks/results

MiniLM, every one of its 36 encoder linears adapted and a head of two labels, random values.

- ``inference``: the adapter folded, as side ops, in slots, and a batch of rows of 16 different adapters, in PyTorch
  (eager and compiled), ONNX Runtime's CUDA, TensorRT and TensorRT-RTX providers, and engines of TensorRT and
  TensorRT-RTX; in float32 (TF32 off), float16 and bfloat16.  Time on the GPU by CUDA events, on inputs that are there;
  the host's wall time apart, from arrays to arrays.  Contenders alternate in random order in one process.
- ``training``: full fine-tuning, VeFA and LoRA by deployfa's own training code, float32 and bfloat16 autocast.

Before a contender is timed at a shape, its answers at that shape are held against the stored float64 reference.  What
is not installed, does not build, answers wrongly or fails is listed with the reason.  Without an NVIDIA GPU it says
what is missing, writes nothing and exits with status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_contenders import Running, open_contender, per_adapter, time_on_gpu
from gpu_forms import FORMS, Form, feeds_of, make_forms
from gpu_machine import describe, smi
from gpu_measure import alternate, first_line, summary
from gpu_plan import PRECISIONS, Planned, make_plan, probe_all, torch_on_gpu, what_is_missing
from gpu_reference import Batches, batches, limit_of, rows_of
from gpu_table import markdown
from gpu_training import compare, fit_once, training_plan
from many_adapters import text_feeds

from deployfa.atomic import write_file
from deployfa.bench import Shape
from deployfa.data import read_rows
from deployfa.edits import Array
from deployfa.errors import DeployfaError
from deployfa.runtimes.probe import DEVICES, probe
from deployfa.runtimes.tensorrt.device import Device, Event
from deployfa.vader import prepare_vader

PARTS = ("inference", "training")
SHAPES = (Shape(1, 16), Shape(1, 128), Shape(8, 128), Shape(16, 128))
#: The system and the form that ratios are to.
REFERENCE, FOLDED = "PyTorch eager", FORMS[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="The folder of gpu.json and gpu.md.")
    parser.add_argument("--only", choices=PARTS, action="append", help="Measure this part anew, keep the other.")
    parser.add_argument("--method", choices=("vefa", "lorfa"), default="vefa", help="Of the adapters in inference.")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="Default: all three.")
    parser.add_argument("--samples", type=int, default=200, help="Of each contender at each shape.")
    parser.add_argument("--seconds", type=float, default=120.0, help="The most for one shape in one precision.")
    parser.add_argument("--warm", type=float, default=0.5, help="Seconds for which a contender runs untimed first.")
    parser.add_argument("--train-rows", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32, help="Of training.")
    parser.add_argument("--launches", type=int, default=3, help="Of each method of training.")
    options = parser.parse_args(arguments)
    devices = probe(DEVICES)
    missing = what_is_missing(devices)
    if missing is not None:
        print(f"error: nothing was measured: {missing}", file=sys.stderr)
        return 2
    file = options.out / "gpu.json"
    report: dict[str, Any] = json.loads(file.read_text()) if options.only and file.is_file() else {"parts": {}}
    try:
        device = Device(0)
        for part in options.only or PARTS:
            print(f"{part} …", file=sys.stderr, flush=True)
            machine = describe(devices, device)
            with tempfile.TemporaryDirectory(prefix="deployfa-gpu-") as scratch:
                measured = MEASURES[part](Path(scratch), device, options)
            machine["gpu"]["after"] = smi(device)
            report["parts"][part] = {"machine": machine, **measured}
            _write(file, json.dumps(report, indent=1, sort_keys=True) + "\n")
    except DeployfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _write(options.out / "gpu.md", markdown(report))
    print(markdown(report))
    return 0


def inference(scratch: Path, device: Device, options: Any) -> dict[str, Any]:
    """All shapes of one precision after another, every contender of the precision open at once."""
    forms = make_forms(scratch, options.method, status=_say)
    chosen = [each for each in make_plan(probe_all()) if each.precision in (options.precision or PRECISIONS)]
    report: dict[str, Any] = {"method": options.method, "results": [], "not_run": []}
    timed = partial(time_on_gpu, start=Event(device), end=Event(device))
    for precision in dict.fromkeys(each.precision for each in chosen):
        with contextlib.ExitStack() as stack:
            plan = [each for each in chosen if each.precision == precision]
            running, refused = open_all(
                plan,
                lambda planned: open_contender(planned, forms[planned.form], device, SHAPES, scratch / "graphs")(),
            )
            for each in running.values():
                stack.callback(_closed, each)
            report["not_run"] += refused
            of_pytorch = pytorch_errors(forms, precision)
            for shape in SHAPES:
                results, refused = one_shape(plan, running, forms, shape, timed, of_pytorch, options)
                report["results"] += results
                report["not_run"] += refused
    return report


def open_all(
    plan: Sequence[Planned], opened: Callable[[Planned], Running]
) -> tuple[dict[Planned, Running], list[dict[str, Any]]]:
    """Those of ``plan`` that open, and a row for each that does not, with the reason."""
    running: dict[Planned, Running] = {}
    refused = []
    for planned in plan:
        why = planned.why_not
        if why is None:
            _say(f"opening {planned.label}")
            try:
                running[planned] = opened(planned)
            except Exception as error:  # a library may fail in any way, and the others still run
                why = first_line(error)
        if why is not None:
            refused.append(_refused(planned, why))
    return running, refused


def pytorch_errors(forms: Mapping[str, Form], precision: str) -> Callable[[Form, Batches], float]:
    """The error of PyTorch eager in ``precision``, on the GPU where PyTorch has one; models are loaded once."""
    where = "cpu" if torch_on_gpu().get("why_not") else "cuda"
    known: dict[bool, Callable[..., Array]] = {}

    def error(form: Form, asked: Batches) -> float:
        mixed = 0 not in form.adapters
        if mixed not in known:
            known[mixed] = per_adapter(form, precision, where)
        return asked.error(known[mixed])

    return error


def held(
    planned: Planned, one: Running, form: Form, asked: Batches, of_pytorch: float
) -> tuple[dict[str, float], str | None]:
    """Error and limit of ``one`` on the reference, and why it is not timed, if it is over."""
    noise = form.bundle.manifest.reference.noise
    is_pytorch = planned.system == REFERENCE
    limit = limit_of(planned.precision, of_pytorch, noise, is_pytorch=is_pytorch)
    error = asked.error(one.answer)
    if error <= limit:
        return {"error": error, "error_limit": limit}, None
    return {}, f"its answers differ from the float64 reference by {error:.1e}, and may by {limit:.1e}"


def one_shape(
    plan: Sequence[Planned],
    running: Mapping[Planned, Running],
    forms: Mapping[str, Form],
    shape: Shape,
    timed: Callable[[Running], float],
    of_pytorch: Callable[[Form, Batches], float],
    options: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results of all that answer rightly at ``shape``, and those that do not, or fail.

    timed: milliseconds of one ``launch`` of a contender on its device.
    """
    _say(f"{shape.batch}x{shape.sequence}: holding answers against the reference")
    asked = {name: batches(rows_of(form.bundle), shape) for name, form in forms.items()}
    errors: dict[Planned, dict[str, float]] = {}
    refused: list[dict[str, Any]] = []
    allowed = {name: of_pytorch(form, asked[name]) for name, form in forms.items()}
    ways: dict[str, Callable[[], tuple[float, float]]] = {}
    for planned, one in running.items():
        form = forms[planned.form]
        try:
            found, why = held(planned, one, form, asked[planned.form], allowed[planned.form])
            if why is None:
                feeds = feeds_of(form, text_feeds(shape.batch, shape.sequence))
                one.upload(feeds)
                ways[planned.label] = partial(sample, one, feeds, timed)
                errors[planned] = found
        except Exception as error:  # as in open_all
            why = first_line(error)
        if why is not None:
            refused.append(_refused(planned, why, shape))
    _say(f"{shape.batch}x{shape.sequence}: timing {len(ways)} contenders")
    rounds = alternate(ways, samples=options.samples, seconds=options.seconds, warm_s=options.warm)
    by_label = {planned.label: planned for planned in plan}
    refused += [_refused(by_label[label], why, shape) for label, why in rounds.failed.items()]
    references = {label: ratios_of(by_label[label]) for label in rounds.samples}
    results = []
    for row in summary(rounds.samples, references):
        planned = by_label[row.pop("contender")]
        results.append({**_named(planned, shape), **errors[planned], **row})
    return results, refused


def ratios_of(planned: Planned) -> tuple[str | None, str | None]:
    """What the ratios of a contender are to: PyTorch eager folded, and its own system folded; in its own precision."""
    eager = Planned(REFERENCE, FOLDED, planned.precision).label
    folded = Planned(planned.system, FOLDED, planned.precision).label
    return (None if planned.label == eager else eager), (None if planned.form == FOLDED else folded)


def sample(one: Running, feeds: Mapping[str, Array], timed: Callable[[Running], float]) -> tuple[float, float]:
    """One forward by the device's clock, and another by the host's."""
    on_gpu = timed(one)
    begin = time.perf_counter()
    one.answer(feeds)
    return on_gpu, 1e3 * (time.perf_counter() - begin)


def training(scratch: Path, device: Device, options: Any) -> dict[str, Any]:
    rows = read_rows(prepare_vader(scratch / "data", train_size=options.train_rows)["movies_train"])
    torch = torch_on_gpu()
    plan = training_plan(torch.get("why_not"), bf16=bool(torch.get("bf16")))

    def run(method: str, precision: str) -> Any:
        _say(f"training {method} in {precision}")
        return fit_once(method, precision, rows, device="cuda", batch_size=options.batch_size)

    results, refused = compare(plan, run, launches=options.launches)
    return {"batch_size": options.batch_size, "rows": len(rows), "results": results, "not_run": refused}


def _named(planned: Planned, shape: Shape) -> dict[str, Any]:
    return {
        "system": planned.system,
        "form": planned.form,
        "precision": planned.precision,
        "batch": shape.batch,
        "sequence": shape.sequence,
    }


def _refused(planned: Planned, why: str, shape: Shape | None = None) -> dict[str, Any]:
    """``batch`` and ``sequence`` are ``None`` for a contender that ran at no shape."""
    at = {"batch": None, "sequence": None} if shape is None else {"batch": shape.batch, "sequence": shape.sequence}
    named = {"system": planned.system, "form": planned.form, "precision": planned.precision}
    return {**named, **at, "reason": " ".join(why.split())}


def _closed(one: Running) -> None:
    with contextlib.suppress(Exception):
        one.close()


def _say(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)


def _write(file: Path, text: str) -> None:
    with write_file(file, force=True) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


MEASURES: dict[str, Callable[[Path, Device, Any], dict[str, Any]]] = {"inference": inference, "training": training}

if __name__ == "__main__":
    sys.exit(main())
