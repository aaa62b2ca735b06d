"""Read and write graphs: weights beside the graph in one external file, paths kept inside the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from deployfa.errors import DeployfaError, InputError

__all__ = ["GRAPH", "load_graph", "save_graph"]

GRAPH = "model.onnx"
#: What is not larger lies in the graph's own file.
_INSIDE_BYTES = 1024
#: Shape inference reads integers (the sizes of a Split into the λ of hundreds of sites) and does not find them in the
#: external file: vectors of them stay inside, and so does what is no larger.
_INTEGER_BYTES = 1 << 16
_INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}


def load_graph(path: Path) -> ir.Model:
    """The graph at ``path``, its weights left on disk until read.

    Raises ``InputError`` if it is no graph, or if it names external data outside its folder or past the end of a file.
    """
    if not path.is_file():
        raise InputError(f"no graph at '{path}'; pass an .onnx file")
    try:
        model = ir.load(path)
    except Exception as error:
        # protobuf, onnx_ir and the file system each fail in their own way on a damaged file
        raise InputError(f"'{path}' is not an ONNX graph ({error}); export it again") from error
    if not len(model.graph):
        # protobuf reads an empty or cut file as a model without a graph
        raise InputError(f"'{path}' is not an ONNX graph (it has no nodes); export it again")
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(path, folder, tensor)
        elif isinstance(tensor, ir.TensorProtoTensor) and _is_short(tensor):
            raise InputError(f"'{path}': weight '{tensor.name}' has another length than its shape; copy it again")
    return model


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol | None]:
    """Every tensor that loading can read: initializers and attributes, in subgraphs and functions too."""
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.subgraphs()]
    for graph in graphs:
        for value in graph.initializers.values():
            yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def _is_short(tensor: ir.TensorProtoTensor) -> bool:
    proto = tensor.raw
    return proto.HasField("raw_data") and len(proto.raw_data) != tensor.nbytes


def _check_external(path: Path, folder: Path, tensor: ir.ExternalTensor) -> None:
    data = (path.parent / tensor.location).resolve()
    if not data.is_relative_to(folder):
        raise InputError(f"'{path}' reads '{tensor.location}', which lies outside its folder; refused")
    size = data.stat().st_size if data.is_file() else -1
    offset, length = tensor.offset or 0, tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length != tensor.nbytes:
        raise InputError(f"'{path}': weight '{tensor.name}' has another length than its shape; copy it again")
    if offset + length > size:
        raise InputError(f"'{path}': weight '{tensor.name}' reaches past the end of '{tensor.location}'; copy it again")


def save_graph(model: ir.Model, folder: Path, *, share_equal: bool = False) -> Path:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder``; ``model`` is not changed.

    ``share_equal``: tensors of the same numbers, in whichever subgraphs, lie in the data file once.
    """
    path = folder / GRAPH
    inside = _inside_bytes(model)
    try:
        with _small_in_memory(model, inside):
            if share_equal:
                _save_sharing(model, path, inside)
            else:
                ir.save(model, path, external_data=f"{GRAPH}.data", size_threshold_bytes=inside)
    except Exception as error:
        # a large weight is folded as it is written; what is wrong with it arrives wrapped by onnx_ir
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DeployfaError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from error
        raise
    return path


def _inside_bytes(model: ir.Model) -> int:
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    sizes = [t.nbytes for t in tensors if t is not None and t.dtype in _INTEGERS and len(t.shape) == 1]
    return max([_INSIDE_BYTES, *(size for size in sizes if size <= _INTEGER_BYTES)])


@contextmanager
def _small_in_memory(model: ir.Model, inside: int) -> Iterator[None]:
    """Small weights that came from an external file, as copies for as long as this lasts.

    onnx_ir would read them from the file and then unmap it, which fails where an array still looks into it.
    """
    held: list[tuple[ir.Value, ir.ExternalTensor]] = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= inside:
                held.append((value, tensor))
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    try:
        yield
    finally:
        for value, tensor in held:
            value.const_value = tensor


def _save_sharing(model: ir.Model, path: Path, inside: int) -> None:
    places: dict[tuple[str, tuple[int, ...], bytes], ir.TensorProtocol] = {}
    values: list[tuple[ir.Value, ir.TensorProtocol, tuple[str, tuple[int, ...], bytes]]] = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= inside or tensor.dtype == ir.DataType.STRING:
                continue
            key = tensor.dtype.name, tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest()
            places.setdefault(key, tensor)
            values.append((value, tensor, key))
    written = ir.external_data.convert_tensors_to_external(list(places.values()), path.parent, f"{path.name}.data")
    stored = dict(zip(places, written, strict=True))
    try:
        for value, tensor, key in values:
            there = stored[key]
            value.const_value = ir.ExternalTensor(
                there.location,
                there.offset,
                there.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=path.parent,
            )
        ir.save(model, path)
    finally:
        for value, tensor, _ in values:
            value.const_value = tensor
