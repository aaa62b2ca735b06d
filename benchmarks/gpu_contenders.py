"""What ``gpu.py`` runs: one forward, from memory of the host to memory of the host, and on the GPU alone.

Every contender has three ways to be asked:

- ``answer(feeds)``: host to host, copies included, as a program that has numpy arrays would call it;
- ``upload(feeds)``, then ``launch()``: put one forward on what was uploaded into ``stream``, without waiting.  What
  events around it measure is the GPU's time, and where the host is the slower of the two, the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gpu_forms import ADAPTER_IDS, Form, Graph, build_engine, own_slots, pytorch_model, typed_graph
from gpu_plan import Planned

from deployfa.bench import Shape
from deployfa.bundle.open_engine import open_engine
from deployfa.edits import Array
from deployfa.runtimes.providers import PROVIDERS
from deployfa.runtimes.targets import open_onnxruntime
from deployfa.runtimes.tensorrt.device import Device, Event, Stream

__all__ = ["Running", "TorchModel", "compiled", "open_contender", "per_adapter", "time_on_gpu"]

Feeds = Mapping[str, Array]
#: The number that NVIDIA has among makers of PCI devices.
_NVIDIA = 0x10DE


class Running(Protocol):
    """A contender, opened."""

    @property
    def stream(self) -> Stream: ...

    def answer(self, feeds: Feeds) -> Array: ...

    def upload(self, feeds: Feeds) -> None: ...

    def launch(self) -> None: ...

    def close(self) -> None: ...


class TorchModel:
    """A PyTorch module; without ``stream`` it answers only, on any device of PyTorch's."""

    def __init__(self, module: Any, stream: Stream | None = None, *, mode: str = "eager") -> None:
        import torch

        self._torch = torch
        self._place = next(module.parameters()).device
        if mode != "eager":
            module = compiled(module, mode=mode)
        self._module = module
        self._stream = stream
        self._own = None if stream is None else torch.cuda.ExternalStream(int(stream.handle), device=self._place)
        if stream is not None:
            # the weights came by another stream
            torch.cuda.synchronize(self._place)
        self._inputs: dict[str, Any] = {}

    @property
    def stream(self) -> Stream:
        assert self._stream is not None, "this one answers only"
        return self._stream

    def answer(self, feeds: Feeds) -> Array:
        with self._torch.inference_mode(), self._torch.cuda.stream(self._own):
            answer: Array = self._forward(self._tensors(feeds)).float().cpu().numpy()
        return answer

    def upload(self, feeds: Feeds) -> None:
        with self._torch.cuda.stream(self._own):
            self._inputs = self._tensors(feeds)
        self.stream.wait()

    def launch(self) -> None:
        with self._torch.inference_mode(), self._torch.cuda.stream(self._own):
            self._forward(self._inputs)

    def close(self) -> None:
        self._inputs = {}
        self._module = None

    def _tensors(self, feeds: Feeds) -> dict[str, Any]:
        return {n: self._torch.from_numpy(a).to(self._place) for n, a in feeds.items() if n != ADAPTER_IDS}

    def _forward(self, tensors: Mapping[str, Any]) -> Any:
        return self._module(**tensors).logits


def compiled(module: Any, **options: Any) -> Any:
    """``torch.compile``, or an error: never a shape that runs uncompiled, nor another model's code."""
    import torch

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    # by default it does not look at hooks, and takes what it compiled for a model without an adapter for one with
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    return torch.compile(module, dynamic=False, fullgraph=True, **options)


class OrtSession:
    """A session of ONNX Runtime on a stream of ours; what is bound lies on the GPU from the start.

    device: ``None`` for a target without one, which then has no stream.
    """

    def __init__(self, target: str, graph: Graph, device: Device | None) -> None:
        import onnxruntime

        self._ort = onnxruntime
        self._stream = None if device is None else Stream(device)
        self._memory = _memory(target, device)
        options = None if self._stream is None else {"user_compute_stream": str(int(self._stream.handle))}
        # it refuses what fell back to the CPU
        self._runner: Any = open_onnxruntime(target, graph.path, spinning=False, provider_options=options)
        self._session = self._runner.session
        self._output = self._runner.outputs[0].name
        self._names = [spec.name for spec in self._runner.inputs if spec.name not in graph.bound]
        self._bound = {name: self._there(array) for name, array in graph.bound.items()}
        self._held: dict[str, Any] = {}
        self._binding: Any = None
        self._options = onnxruntime.RunOptions()
        # the stream is waited for, by an event
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @property
    def stream(self) -> Stream:
        assert self._stream is not None, "this one has no GPU"
        return self._stream

    @property
    def launched(self) -> Array:
        """What the last ``launch`` wrote, once the stream is done."""
        answer: Array = self._held[self._output].numpy()
        return answer

    def answer(self, feeds: Feeds) -> Array:
        values = {name: self._ort.OrtValue.ortvalue_from_numpy(feeds[name]) for name in self._names}
        (found,) = self._session.run_with_ort_values([self._output], {**values, **self._bound})
        answer: Array = found.numpy()
        return answer

    def upload(self, feeds: Feeds) -> None:
        self._binding = self._session.io_binding()
        self._held = {**self._bound, **{name: self._there(feeds[name]) for name in self._names}}
        for name, value in self._held.items():
            self._binding.bind_ortvalue_input(name, value)
        self._held[self._output] = self._there(np.zeros_like(self.answer(feeds)))
        self._binding.bind_ortvalue_output(self._output, self._held[self._output])

    def launch(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)

    def close(self) -> None:
        self._binding = self._session = self._runner = None
        self._bound, self._held = {}, {}
        if self._stream is not None:
            self._stream.close()

    def _there(self, array: Array) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *self._memory)


def _memory(target: str, device: Device | None) -> tuple[Any, ...]:
    """Where inputs and outputs lie, as ``OrtValue`` takes it: a plug-in's GPU has a maker, a provider's a name."""
    if device is None:
        return "cpu", 0
    if PROVIDERS[target].plugin is not None:
        return "gpu", device.number, _NVIDIA
    return "cuda", device.number


class Engine:
    """An engine of a bundle; its adapter is bound once."""

    def __init__(self, form: Form, target: str, name: str, *, cuda_graphs: bool) -> None:
        self._runner = open_engine(form.bundle, target, name=name, cuda_graphs=cuda_graphs)
        # empty until then
        self._runner.bind(own_slots(form.bundle))
        self._output = self._runner.outputs[0].name
        self._names = [spec.name for spec in self._runner.inputs]

    @property
    def stream(self) -> Stream:
        return self._runner.stream

    def answer(self, feeds: Feeds) -> Array:
        return self._runner.run({name: feeds[name] for name in self._names})[self._output]

    def upload(self, feeds: Feeds) -> None:
        # a run is how it is given what the next ones compute on
        self.answer(feeds)

    def launch(self) -> None:
        self._runner.execute()

    def close(self) -> None:
        self._runner.close()


def open_contender(
    planned: Planned, form: Form, device: Device, shapes: Sequence[Shape], scratch: Path
) -> Callable[[], Running]:
    """Make what ``planned`` needs (its graph, its engine), and return what opens it.

    Raises ``DeployfaError``, or whatever a library raises, where it cannot be made.
    """
    kind, target = planned.kind, planned.target
    if kind == "torch":

        def open_torch() -> Running:
            place = f"cuda:{device.number}"
            module = pytorch_model(form.adapters[0], planned.form, planned.precision, place)
            return TorchModel(module, Stream(device), mode=target)

        return open_torch
    if kind.startswith("onnxruntime"):
        folder = scratch / planned.label.replace(" ", "-").replace(",", "")
        fusion = "ort" if kind.endswith("fused") else "none"
        graph = typed_graph(form, planned.precision, folder, fusion=fusion)
        return lambda: OrtSession(target, graph, device)
    name = f"{target}-{planned.precision}"
    if all(engine.name != name for engine in form.bundle.manifest.engines):
        build_engine(form, target, planned.precision, shapes, device.capability)
    return lambda: Engine(form, target, name, cuda_graphs=kind.endswith("graphs"))


def per_adapter(form: Form, precision: str, device: str) -> Callable[[Feeds], Array]:
    """PyTorch eager, the adapter beside its layers; a mixed batch one adapter after the other.

    What 16 bits cost in PyTorch, whatever runs the form.
    """
    models = {row: TorchModel(pytorch_model(each, "side op", precision, device)) for row, each in form.adapters.items()}

    def answer(feeds: Feeds) -> Array:
        ids = feeds.get(ADAPTER_IDS)
        if ids is None:
            return models[0].answer(feeds)
        answers: list[Any] = [None] * len(ids)
        for row in dict.fromkeys(ids.tolist()):
            mine = np.flatnonzero(ids == row)
            found = models[row].answer({name: array[mine] for name, array in feeds.items()})
            for number, one in zip(mine, found, strict=True):
                answers[number] = one
        return np.stack(answers)

    return answer


def time_on_gpu(running: Running, start: Event, end: Event) -> float:
    """Milliseconds of one ``launch``, by the GPU's clock."""
    start.record(running.stream)
    running.launch()
    end.record(running.stream)
    end.wait()
    return end.elapsed_ms(start)
