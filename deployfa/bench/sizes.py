"""Bytes on disk that a contender needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deployfa.bench.contender import Contender

if TYPE_CHECKING:
    import onnx

__all__ = ["contender_bytes", "graph_bytes"]

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def contender_bytes(contender: Contender) -> int | None:
    """The graph with its external data; for PyTorch the base's weight files with the adapter.  ``None`` if unknown."""
    if contender.kind == "onnx":
        return None if contender.graph is None else graph_bytes(contender.graph)
    folder = Path(contender.model or "")
    if contender.model is None or not folder.is_dir():
        return None
    files = [path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)]
    if contender.adapter is not None:
        files += [contender.adapter] if contender.adapter.is_file() else contender.adapter.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def graph_bytes(graph: Path) -> int | None:
    """The file and every external-data file that its tensors name, each once; ``None`` for a file that is not ONNX."""
    import onnx

    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception:  # protobuf's DecodeError, or onnx's own; such as an .ort file, which ONNX Runtime also loads
        return None
    folder = graph.parent
    files = {folder / name for name in _external_files(model.graph)}
    return graph.stat().st_size + sum(path.stat().st_size for path in files if path.is_file())


def _external_files(graph: onnx.GraphProto) -> Iterator[str]:
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors.append(attribute.t)
            tensors.extend(attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _external_files(inner)
    for tensor in tensors:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")
