"""Graphs compiled for a provider: ONNX graphs whose ``EPContext`` nodes hold its engines (``ep_cache_context``).

Compiling takes seconds to minutes and a session of the result opens at once.  What is in such a node is machine code:
a graph with one is opened only if its sha256 is the one that ``compile_context`` returned.

Source: https://onnxruntime.ai/docs/execution-providers/EP-Context-Design.html
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx

from deployfa.atomic import write_file
from deployfa.errors import InputError, MissingExtraError, RuntimeTargetError
from deployfa.runtimes.providers import PROVIDERS, attach

__all__ = ["check_trusted", "compile_context"]


def compile_context(graph: Path, out: Path, target: str, *, force: bool = False) -> str:
    """Compile ``graph`` for ``target`` on the device at hand into ``out``, one file, and return its sha256.

    ``OnnxRuntimeRunner(out, provider=..., trusted_sha256=...)`` opens it, and names what was not compiled.

    Raises ``InputError`` for a target that is no provider or where there is no graph, ``RuntimeTargetError`` where the
    provider cannot be had or compiles nothing, and ``OutputExistsError``; ``out`` is whole or not there.
    """
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu", "compiling a graph for a provider") from error
    provider = PROVIDERS.get(target)
    if provider is None:
        raise InputError(f"'{target}' is no provider of ONNX Runtime; pick from: {', '.join(PROVIDERS)}")
    if not graph.is_file():
        raise InputError(f"no graph at '{graph}'; pass an .onnx file")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    asked = attach(ort, options, provider.name)
    for name, settings in zip(
        asked.arguments.get("providers", ()), asked.arguments.get("provider_options", ()), strict=True
    ):
        options.add_provider(name, settings)
    with write_file(out, force=force) as partial:
        try:
            ort.ModelCompiler(
                options,
                str(graph),
                embed_compiled_data_into_model=True,
                flags=ort.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED,
            ).compile_to_file(str(partial))
        except Exception as error:  # its exceptions share no base class
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeTargetError(
                f"{provider.name} does not compile '{graph}' ({text}); export it with --optimize none, or pick another "
                "target"
            ) from error
        return _sha256(partial.read_bytes())


def check_trusted(graph: Path | bytes | str, sha256: str | None) -> None:
    """Raise ``RuntimeTargetError`` for a graph with compiled engines in it, unless its sha256 is ``sha256``."""
    if sha256 is not None:
        content = graph if isinstance(graph, bytes) else Path(graph).read_bytes()
        if _sha256(content) != sha256:
            raise RuntimeTargetError(
                "the compiled graph is not the one that was vouched for (sha256 differs); compile it again"
            )
        return
    shown = "the graph" if isinstance(graph, bytes) else f"'{graph}'"
    try:
        model = onnx.load_from_string(graph) if isinstance(graph, bytes) else onnx.load(graph, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, or onnx's own
        # ONNX Runtime reads other formats too, in which engines could hide
        raise RuntimeTargetError(f"{shown} is not an ONNX graph ({error}); export it again") from error
    nodes = [*_all_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    if any(node.op_type == "EPContext" for node in nodes):
        raise RuntimeTargetError(
            f"{shown} holds compiled engines, which are code, and nobody vouches for them; compile it here from the "
            "graph in standard operators"
        )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
