"""``OnnxRuntimeRunner``: a graph in ONNX Runtime, on the provider that was asked for or not at all.

Source: https://onnxruntime.ai/docs/api/python/api_summary.html
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deployfa.edits import Array
from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError
from deployfa.runtimes.assignment import RECORD, check_assignment
from deployfa.runtimes.context import check_trusted
from deployfa.runtimes.initializers import replace_initializers
from deployfa.runtimes.providers import CPU, attach, provider_of
from deployfa.runtimes.runner import Spinning, TensorSpec

__all__ = ["OnnxRuntimeRunner", "check_feeds"]

_NUMPY_NAMES = {"float": "float32", "double": "float64", "string": "str"}
_ONNX_BFLOAT16 = 16
#: Microseconds.  MiniLM at 1x16, two threads: 2.3 ms with 10 to 30, 2.7 with none.
_BRIEF_US = 20


class OnnxRuntimeRunner:
    """One inference session.

    model: a path, or the bytes of a graph whose weights are inside it.  provider: exactly this one: what computes with
    numbers runs there, or no session is made (``deployfa.runtimes.assignment`` has the rule).  threads: of
    one operator, ``None`` for ONNX Runtime's choice (one a physical core).  spinning: whether idle threads keep
    polling, which answers sooner and burns a core, or ``brief``: for 20 µs, then they sleep (not before ONNX Runtime
    1.32).  optimize: ``False`` runs the graph exactly as it is written.  initializers: values that take the place
    of the graph's own, by name, before anything is optimised (see ``deployfa.runtimes.initializers``); the graph must
    be a path.  bound: inputs that every run gets the same arrays for (tables of adapters), which stay where they are
    and are not among ``inputs``; ``bind`` changes them.
    trusted_sha256: of a graph that holds compiled engines (``deployfa.runtimes.context``), which are code.
    provider_options: the provider's own, such as CUDA's ``user_compute_stream``.

    Raises ``InputError`` when there is no such file, ``MissingExtraError`` without onnxruntime, and
    ``RuntimeTargetError`` when the graph does not load, the session did not get its provider, or a node fell back from
    it, and for engines that nobody vouches for.
    """

    def __init__(
        self,
        model: Path | bytes | str,
        *,
        provider: str = CPU,
        threads: int | None = None,
        spinning: Spinning = True,
        optimize: bool = True,
        initializers: Mapping[str, Array] | None = None,
        bound: Mapping[str, Array] | None = None,
        trusted_sha256: str | None = None,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        ort = _import_onnxruntime()
        source: str | bytes = model if isinstance(model, bytes) else str(model)
        if isinstance(source, str) and not Path(source).is_file():
            raise InputError(f"no graph at '{source}'; pass an .onnx file")
        shown = "the graph" if isinstance(source, bytes) else f"'{source}'"
        options = _session_options(ort, threads=threads, spinning=spinning, optimize=optimize)
        asked = attach(ort, options, provider, provider_options)
        if provider != CPU:
            # the CPU's provider loads no engines, and nothing falls back from it
            check_trusted(model, trusted_sha256)
            options.add_session_config_entry(RECORD, "1")
        alive: list[Any] = []
        if initializers:
            if isinstance(model, bytes):
                raise InputError("initializers can be replaced in a graph file only; pass its path")
            source, alive = replace_initializers(options, Path(model), initializers)
        missing = f" ({', '.join(asked.missing)} not found)" if asked.missing else ""
        try:
            session = ort.InferenceSession(source, sess_options=options, **asked.arguments)
        except Exception as error:  # its exceptions share no base class
            raise RuntimeTargetError(
                f"onnxruntime does not load {shown} ({_first_line(error)}){missing}; "
                f"{_way_out(provider, 'export it again')}"
            ) from error
        del alive  # the session has copied them
        got = session.get_providers()
        if not got or got[0] != provider:
            raise RuntimeTargetError(
                f"asked for {provider}, but the session of {shown} runs on {', '.join(got) or 'nothing'}{missing}; "
                f"{_way_out(provider, 'install what that provider needs')}"
            )
        if provider != CPU:
            check_assignment(session, provider, model if isinstance(model, bytes) else Path(model), optimize=optimize)
        session.disable_fallback()
        self.session = session
        self.provider = provider
        self._all_inputs = tuple(_spec(node) for node in session.get_inputs())
        self._outputs = tuple(_spec(node) for node in session.get_outputs())
        self._slots = tuple(_spec(node) for node in session.get_overridable_initializers())
        self._bound: dict[str, Any] = {}
        self._inputs = self._all_inputs
        if bound:
            self.bind(bound)
        known = (*self._inputs, *self._outputs, *self._slots)
        self._has_bfloat16 = any(spec.dtype == "bfloat16" for spec in known)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` must be fed."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def slots(self) -> tuple[TensorSpec, ...]:
        """What ``run`` may be fed besides: graph inputs with a default."""
        return self._slots

    def bind(self, arrays: Mapping[str, Array]) -> None:
        """From now on every run gets ``arrays`` for these inputs; they are not copied and must not change in shape.

        Takes microseconds, whatever their size.  Raises ``RuntimeTargetError`` for a name that is no input, and for an
        array that does not fit it.
        """
        self._bound = self.values(arrays)
        self._inputs = tuple(spec for spec in self._all_inputs if spec.name not in arrays)

    def values(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """``arrays`` as ONNX Runtime's own values on the same memory, checked against the inputs of their names."""
        ort = _import_onnxruntime()
        check_feeds(arrays, (), optional=(*self._all_inputs, *self._slots))
        return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}

    def run(
        self, feeds: Mapping[str, Array], bound: Mapping[str, Any] | None = None, *, options: Any = None
    ) -> dict[str, Array]:
        """One inference: every input, and any slots, by name → every output by name.

        ``bound``, made by ``values``, takes the place of what is bound, for this run only; ``options`` is ONNX
        Runtime's own ``RunOptions``.  Raises
        ``RuntimeTargetError`` on a missing, extra or misshapen feed before the runtime is touched, and with the
        runtime's own words when the run itself fails.
        """
        check_feeds(feeds, self._inputs, optional=self._slots)
        held = self._bound if bound is None else bound
        try:
            if self._has_bfloat16 or held:
                return self._run_values(feeds, held, options)
            results = self.session.run(None, dict(feeds), options)
        except Exception as error:
            raise RuntimeTargetError(
                f"onnxruntime failed while running ({_first_line(error)}); check the values fed"
            ) from error
        return {spec.name: result for spec, result in zip(self._outputs, results, strict=True)}

    def run_values(
        self, values: Mapping[str, Any], bound: Mapping[str, Any] | None = None, *, options: Any = None
    ) -> dict[str, Any]:
        """``run`` with ONNX Runtime's own values in and out: what one run answers is handed to the next uncopied.

        Values made by ``values`` have been checked; of others the runtime itself says what does not fit.
        """
        held = self._bound if bound is None else bound
        try:
            results = self.session.run_with_ort_values(None, {**held, **values}, options)
        except Exception as error:
            raise RuntimeTargetError(
                f"onnxruntime failed while running ({_first_line(error)}); check the values fed"
            ) from error
        return {spec.name: result for spec, result in zip(self._outputs, results, strict=True)}

    def _run_values(self, feeds: Mapping[str, Array], held: Mapping[str, Any], options: Any) -> dict[str, Array]:
        """The way for what is bound, and for bfloat16, which numpy does not know: its bits travel as uint16 and are
        given their type here."""
        ort = _import_onnxruntime()
        values = dict(held)
        for name, array in feeds.items():
            if array.dtype.name == "bfloat16":
                bits = np.ascontiguousarray(array).view(np.uint16)
                values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)
            else:
                values[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        results = self.session.run_with_ort_values(None, values, options)
        return {
            spec.name: _bfloat16_array(value) if spec.dtype == "bfloat16" else value.numpy()
            for spec, value in zip(self._outputs, results, strict=True)
        }


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu", "running a graph") from error
    return onnxruntime


def _way_out(provider: str, otherwise: str) -> str:
    found = provider_of(provider)
    if found is None or provider == CPU:
        return f"{otherwise} or pick another provider"
    target, known = found
    return f"{target} needs {known.needs}: install what is missing, or pick the target onnxruntime-cpu"


def _knows_brief(ort: Any) -> bool:
    """ONNX Runtime 1.32 has the setting; an older one would not know it, and spin on."""
    numbers = [int(part) for part in str(ort.__version__).split(".")[:2]]
    return numbers >= [1, 32]


def _session_options(ort: Any, *, threads: int | None, spinning: Spinning, optimize: bool) -> Any:
    options = ort.SessionOptions()
    # errors come as exceptions, with the same words
    options.log_severity_level = 4
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads is {threads}; pass 1 or more")
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if spinning == "brief" and _knows_brief(ort):
        # a thread that sleeps between two operators must be woken for the second, which costs as much as a small one
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_BRIEF_US))
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    elif spinning is not True:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _spec(node: Any) -> TensorSpec:
    """``tensor(float)`` → ``float32``; a dimension without a name gets ``INPUT_AXIS``."""
    kind = str(node.type)
    if not kind.startswith("tensor("):
        raise RuntimeTargetError(f"'{node.name}' is a {kind}; only graphs of plain tensors can be run")
    element = kind.removeprefix("tensor(").removesuffix(")")
    shape = tuple(
        size if isinstance(size, int | str) else f"{node.name}_{axis}" for axis, size in enumerate(node.shape)
    )
    return TensorSpec(node.name, _NUMPY_NAMES.get(element, element), shape)


def _bfloat16_array(value: Any) -> Array:
    """A copy of a bfloat16 OrtValue in CPU memory, whose own ``numpy()`` refuses the type."""
    import ctypes

    import ml_dtypes

    shape = tuple(value.shape())
    content = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape)))
    array: Array = np.frombuffer(content, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(shape).copy()
    return array


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def check_feeds(
    feeds: Mapping[str, Array], inputs: Sequence[TensorSpec], *, optional: Sequence[TensorSpec] = ()
) -> None:
    """Raise ``RuntimeTargetError`` unless ``feeds`` has every input, nothing unknown, and each fits its spec.

    A dimension that bears the same name in two inputs must have the same size in both.
    """
    missing = [spec.name for spec in inputs if spec.name not in feeds]
    if missing:
        wanted = ", ".join(spec.name for spec in inputs)
        raise RuntimeTargetError(f"input '{missing[0]}' is missing; feed all of: {wanted}")
    known = {spec.name: spec for spec in (*inputs, *optional)}
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in feeds.items():
        spec = known.get(name)
        if spec is None:
            raise RuntimeTargetError(f"'{name}' is not an input of this graph; its inputs: {', '.join(known)}")
        if not isinstance(array, np.ndarray):
            raise RuntimeTargetError(f"input '{name}' is a {type(array).__name__}; feed a numpy array")
        _check_one(spec, array, sizes)


def _check_one(spec: TensorSpec, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    name = spec.name
    if array.dtype.name != spec.dtype and not (spec.dtype == "str" and array.dtype.kind in "OUS"):
        raise RuntimeTargetError(f"input '{name}' is {array.dtype.name}; feed {spec.dtype}")
    if array.ndim != len(spec.shape):
        raise RuntimeTargetError(f"input '{name}' has shape {list(array.shape)}; feed {_shown(spec)}")
    for size, want in zip(array.shape, spec.shape, strict=True):
        if isinstance(want, int):
            if size != want:
                raise RuntimeTargetError(f"input '{name}' has shape {list(array.shape)}; feed {_shown(spec)}")
            continue
        first, owner = sizes.setdefault(want, (size, name))
        if first != size:
            raise RuntimeTargetError(
                f"input '{name}' has {want} {size}, but input '{owner}' has {first}; make them the same"
            )


def _shown(spec: TensorSpec) -> str:
    return f"[{', '.join(str(size) for size in spec.shape)}]"
