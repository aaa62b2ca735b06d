"""The requests: a text as JSON, or raw tensors behind a JSON header (the protocol's binary tensor extension)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from deployfa.errors import InputError
from deployfa.load.discovery import TensorInfo

__all__ = ["Requests"]

Array = npt.NDArray[Any]
_TEXT = "text"
_IMAGE = "image"
#: Different feeds among which requests draw, so that a server that remembers its last answer gains nothing.
_FEEDS = 16
#: No BF16 in numpy; its zeros are those of any 16 bits.
_TYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "BF16": np.uint16,
    "FP32": np.float32,
    "FP64": np.float64,
}


class Requests:
    """``build(item, adapter)`` is one request; ``items`` are the different inputs that there are.

    inputs: of the model, from its metadata.  texts: with any, an input ``text`` of one string; without, every other
    input as a raw tensor, -1 in its shape read as ``batch`` in front and ``tokens`` behind: ``input_ids`` random in
    100..999, ``attention_mask`` ones, the rest zeros.  adapters, strength: request parameters.

    Raises ``InputError`` where the model cannot be fed like that.
    """

    def __init__(
        self,
        model: str,
        inputs: Sequence[TensorInfo],
        *,
        texts: Sequence[str],
        tokens: int,
        batch: int,
        adapters: Sequence[str],
        strength: float | None,
        generator: np.random.Generator,
    ) -> None:
        self._parameters: list[dict[str, Any]] = [{"binary_data_output": True}]
        if adapters:
            given = {} if strength is None else {"strength": strength}
            self._parameters = [{"adapter": name, **given, "binary_data_output": True} for name in adapters]
        self._texts = list(texts)
        self._tensors: list[dict[str, Any]] = []
        self._feeds: list[bytes] = []
        self._headers: dict[int, bytes] = {}
        if texts:
            if not any(each.name == _TEXT and each.datatype == "BYTES" for each in inputs):
                raise InputError(
                    f"model '{model}' takes no texts (its inputs: {_names(inputs)}); leave out --text and --data, "
                    "and raw tensors are sent"
                )
            return
        raw = [each for each in inputs if each.name not in {_TEXT, _IMAGE}]
        if not raw:
            raise InputError(
                f"model '{model}' has no inputs for raw tensors (its inputs: {_names(inputs)}); pass --text"
            )
        feeds = [_feed(model, raw, batch, tokens, generator) for _ in range(_FEEDS)]
        self._feeds = [b"".join(array.tobytes() for array in feed) for feed in feeds]
        self._tensors = [
            {
                "name": each.name,
                "shape": list(array.shape),
                "datatype": each.datatype,
                "parameters": {"binary_data_size": array.nbytes},
            }
            for each, array in zip(raw, feeds[0], strict=True)
        ]

    @property
    def items(self) -> int:
        return len(self._texts) or len(self._feeds)

    def build(self, item: int, adapter: int) -> tuple[bytes, Mapping[str, str]]:
        """Body and headers; ``item`` in [0, items), ``adapter`` an index into ``adapters`` (0 where there are none)."""
        if self._texts:
            tensor = {"name": _TEXT, "datatype": "BYTES", "shape": [1], "data": [self._texts[item]]}
            body = msgspec.json.encode({"inputs": [tensor], "parameters": self._parameters[adapter]})
            return body, {"Content-Type": "application/json"}
        header = self._headers.get(adapter)
        if header is None:
            header = msgspec.json.encode({"inputs": self._tensors, "parameters": self._parameters[adapter]})
            self._headers[adapter] = header
        return header + self._feeds[item], {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        }


def _feed(
    model: str, inputs: Sequence[TensorInfo], batch: int, tokens: int, generator: np.random.Generator
) -> list[Array]:
    found: list[Array] = []
    for each in inputs:
        kind = _TYPES.get(each.datatype)
        if kind is None:
            raise InputError(
                f"input '{each.name}' of model '{model}' is {each.datatype}, which raw tensors cannot be; pass --text"
            )
        shape = [size if size >= 0 else batch if axis == 0 else tokens for axis, size in enumerate(each.shape)]
        if math.prod(shape) > 2**28:
            raise InputError(f"input '{each.name}' of model '{model}' would be {shape}; lower --batch or --tokens")
        if each.name == "input_ids":
            found.append(generator.integers(100, 1000, shape).astype(kind))
        else:
            found.append(np.full(shape, each.name == "attention_mask", dtype=kind))
    return found


def _names(inputs: Sequence[TensorInfo]) -> str:
    return ", ".join(f"{each.name} {each.datatype}" for each in inputs) or "none"
