"""The JSON part of an inference request, and where its binary tensors lie.

Source: https://github.com/triton-inference-server/server/tree/main/docs/protocol, the v2 protocol and its binary
tensor data extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from deployfa.edits import Array
from deployfa.errors import RequestError
from deployfa.serving.limits import Limits
from deployfa.serving.tensors import from_binary, from_json

__all__ = ["InferRequest", "WantedOutput", "parse_request"]

Scalar = str | int | float | bool | None


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Scalar] | None = None
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Scalar] | None = None


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Scalar] | None = None
    outputs: list[_Output] | None = None


class WantedOutput(msgspec.Struct, frozen=True):
    """An output that was asked for; ``binary``: as bytes behind the JSON; ``classes``: the k best, 0 for numbers."""

    name: str
    binary: bool
    classes: int = 0


class InferRequest(msgspec.Struct):
    """What a client asked: ``outputs`` is ``None`` for all, then ``binary`` says how."""

    id: str
    inputs: dict[str, Array]
    parameters: Mapping[str, Any]
    outputs: list[WantedOutput] | None
    binary: bool


_DECODER = msgspec.json.Decoder(_Request)
_SHARED_MEMORY = "this server takes no shared memory; send the tensor in the request"


def parse_request(body: bytes, header_length: bytes | None, limits: Limits) -> InferRequest:
    """``header_length``: of the JSON part, as the header ``Inference-Header-Content-Length`` says it.

    Raises ``RequestError`` for whatever is not a request: one line that names the field.
    """
    size = len(body) if header_length is None else _header_length(header_length, len(body))
    if size > limits.json_bytes:
        raise RequestError(
            f"the JSON part has {size:,} bytes, more than {limits.json_bytes:,}; send tensors as binary data", 413
        )
    request = _decoded(body if size == len(body) else body[:size])
    parameters = request.parameters or {}
    if len(request.inputs) > limits.tensors or len(request.outputs or ()) > limits.tensors:
        raise RequestError(f"more than {limits.tensors} tensors in one request; send fewer")
    inputs = _inputs(request.inputs, memoryview(body)[size:], limits)
    binary = bool(parameters.get("binary_data_output", False))
    outputs = None if not request.outputs else _outputs(request.outputs, binary)
    return InferRequest(request.id, inputs, parameters, outputs, binary)


def _header_length(value: bytes, body: int) -> int:
    text = value.decode("latin-1").strip()
    # int() would take '1_0', '+1' and the digits of other scripts
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise RequestError(
            f"Inference-Header-Content-Length is '{text[:40]}'; send the length of the JSON part in bytes"
        )
    length = int(text)
    if length > body:
        raise RequestError(f"Inference-Header-Content-Length is {length}, the body has {body} bytes; send all of it")
    return length


def _decoded(content: bytes) -> _Request:
    try:
        return _DECODER.decode(content)
    except RecursionError as error:
        raise RequestError("the JSON is nested too deeply; send tensors as flat lists") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RequestError(f"no inference request: {str(error)[:200]}") from error


def _inputs(tensors: list[_Tensor], binary: memoryview, limits: Limits) -> dict[str, Array]:
    found: dict[str, Array] = {}
    offset, elements = 0, 0
    for tensor in tensors:
        name = tensor.name
        if name in found:
            raise RequestError(f"input '{name[:80]}' is given twice; send it once")
        parameters = tensor.parameters or {}
        if "shared_memory_region" in parameters:
            raise RequestError(f"input '{name[:80]}': {_SHARED_MEMORY}")
        count = _count(tensor, limits)
        elements += count
        if elements > limits.elements:
            raise RequestError(f"the inputs have more than {limits.elements:,} elements; send fewer rows", 413)
        size = parameters.get("binary_data_size")
        if size is None:
            found[name] = from_json(name, tensor.datatype, tensor.shape, count, tensor.data, limits)
            continue
        if tensor.data is not msgspec.UNSET:
            raise RequestError(f"input '{name[:80]}' has both data and binary_data_size; send one of them")
        if type(size) is not int or not 0 <= size <= len(binary) - offset:
            raise RequestError(
                f"input '{name[:80]}' has binary_data_size {str(size)[:40]}, and {len(binary) - offset} bytes are left "
                "behind the JSON; send its bytes there"
            )
        found[name] = from_binary(name, tensor.datatype, tensor.shape, count, binary[offset : offset + size], limits)
        offset += size
    if offset != len(binary):
        raise RequestError(
            f"{len(binary) - offset} bytes behind the JSON belong to no input; say binary_data_size for each input"
        )
    if not found:
        raise RequestError("the request has no inputs; send them as a list 'inputs'")
    return found


def _count(tensor: _Tensor, limits: Limits) -> int:
    """Elements of the shape."""
    shape = tensor.shape
    if len(shape) > limits.dimensions:
        raise RequestError(f"input '{tensor.name[:80]}' has {len(shape)} dimensions; send {limits.dimensions} at most")
    # a size of 0 hides none of the others, which numpy would still refuse
    whole = 1
    for size in shape:
        if size < 0:
            raise RequestError(f"input '{tensor.name[:80]}' has a dimension of {str(size)[:40]}; send sizes from 1 on")
        whole *= size or 1
        if whole > limits.elements:
            raise RequestError(
                f"input '{tensor.name[:80]}' has more than {limits.elements:,} elements; send fewer rows", 413
            )
    return 0 if 0 in shape else whole


def _outputs(outputs: list[_Output], binary: bool) -> list[WantedOutput]:
    found: dict[str, WantedOutput] = {}
    for output in outputs:
        parameters = output.parameters or {}
        if output.name in found:
            raise RequestError(f"output '{output.name[:80]}' is asked for twice; ask once")
        if "shared_memory_region" in parameters:
            raise RequestError(f"output '{output.name[:80]}': {_SHARED_MEMORY}")
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0:
            raise RequestError(
                f"output '{output.name[:80]}' asks for {str(classes)[:40]} classes; send a count from 1 on"
            )
        wanted = WantedOutput(output.name, bool(parameters.get("binary_data", binary)), classes)
        found[output.name] = wanted
    return list(found.values())
