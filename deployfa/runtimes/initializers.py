"""Give a session other weights than its file has, before ONNX Runtime optimises the graph.

ONNX Runtime has two calls for it.  ``SessionOptions.add_external_initializers`` replaces what the file keeps as
external data, before any optimisation, after checking name, shape and type, and copies the values.
``SessionOptions.add_initializer`` comes too late: what the optimiser computed from the old value (a transposed weight,
a product of constants) stays the old one.  So the first is used; and small tensors, which lie inside the graph file and
which it refuses, are put into the file's bytes in memory.

Source: https://onnxruntime.ai/docs/api/c/struct_ort_api.html (AddExternalInitializers)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deployfa.edits import Array
from deployfa.errors import RuntimeTargetError

if TYPE_CHECKING:
    import onnx

__all__ = ["replace_initializers"]

_FOLDER = "session.model_external_initializers_file_folder_path"
_BFLOAT16 = 16


def replace_initializers(options: Any, graph: Path, values: Mapping[str, Array]) -> tuple[str | bytes, list[Any]]:
    """Prepare ``options`` so that a session has ``values``; returns what to make it of (the path or the bytes of the
    graph) and what must stay alive until it is made.

    ``OrtValue.ortvalue_from_numpy`` shares the array's memory and the options keep neither: freed too early, the
    session would take whatever lies there by then.  Once made, it has its own copy.  Raises ``RuntimeTargetError`` if
    the graph has no such initializer, or one of another shape or type.
    """
    import onnx

    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError, or onnx's own
        raise RuntimeTargetError(f"'{graph}' is not an ONNX graph ({error}); export it again") from error
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    outside: dict[str, Array] = {}
    inside = 0
    for name, array in values.items():
        tensor = stored.get(name)
        if tensor is None:
            raise RuntimeTargetError(
                f"'{graph}' has no initializer '{name}' to replace; the values are of another graph"
            )
        _check(graph, tensor, array)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            outside[name] = array
        else:
            tensor.CopyFrom(_proto(tensor, array))
            inside += 1
    alive = [_value(array) for array in outside.values()]
    if outside:
        options.add_external_initializers(list(outside), [value for value, _ in alive])
    if not inside:
        return str(graph), alive
    options.add_session_config_entry(_FOLDER, str(graph.parent.resolve()))
    content: bytes = model.SerializeToString()
    return content, alive


def _check(graph: Path, tensor: onnx.TensorProto, array: Array) -> None:
    import onnx

    want = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if array.dtype != want or array.shape != tuple(tensor.dims):
        raise RuntimeTargetError(
            f"initializer '{tensor.name}' of '{graph}' is {want.name} {[*tensor.dims]}, the value for it is "
            f"{array.dtype.name} {[*array.shape]}; the values are of another graph"
        )


def _proto(tensor: onnx.TensorProto, array: Array) -> onnx.TensorProto:
    import onnx

    ordered = np.ascontiguousarray(array)
    return onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=ordered.tobytes())


def _value(array: Array) -> tuple[Any, Array]:
    """An ``OrtValue`` and the array whose memory it shares."""
    from onnxruntime import OrtValue

    ordered: Array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.name == "bfloat16":
        ordered = ordered.view(np.uint16)
        return OrtValue.ortvalue_from_numpy_with_onnx_type(ordered, _BFLOAT16), ordered
    return OrtValue.ortvalue_from_numpy(ordered), ordered
