"""What a model is, in the protocol's words: its metadata, and the configuration that Triton's clients read."""

from __future__ import annotations

from typing import Any

from deployfa.serving.datatypes import BYTES, datatype_of
from deployfa.serving.limits import IMAGE
from deployfa.serving.model import VERSION, ServedModel
from deployfa.serving.text import LABEL, SCORE, TEXT

__all__ = ["PLATFORM", "configuration", "metadata"]

PLATFORM = "onnxruntime_onnx"
_TYPES = {BYTES: "TYPE_STRING"}


def metadata(model: ServedModel) -> dict[str, Any]:
    """A dynamic dimension is -1.  ``text``, or ``image``, takes the place of all other inputs."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [_tensor(*each) for each in _inputs(model)],
        "outputs": [_tensor(*each) for each in _outputs(model)],
    }


def configuration(model: ServedModel) -> dict[str, Any]:
    """As Triton's ``ModelConfig``, without the dimension that counts rows."""
    policy, batched = model.policy, model.signature.batch is not None
    reads_raw = model.text is not None or model.image is not None

    def fields(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
        kind = _TYPES.get(datatype, f"TYPE_{datatype}")
        return {"name": name, "data_type": kind, "dims": (shape[1:] or [1]) if batched else shape}

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": policy.max_rows if batched else 0,
        "input": [{**fields(*each), "optional": reads_raw} for each in _inputs(model)],
        "output": [fields(*each) for each in _outputs(model)],
        "instance_group": [{"name": f"{model.name}_0", "kind": "KIND_CPU", "count": 1}],
        "dynamic_batching": {
            "preferred_batch_size": [policy.max_rows],
            "max_queue_delay_microseconds": int(1e6 * policy.max_delay_s),
        },
        "parameters": {
            "max_tokens": {"string_value": str(policy.max_tokens)},
            "max_queue": {"string_value": str(policy.max_queue)},
        },
    }


def _inputs(model: ServedModel) -> list[tuple[str, str, list[int]]]:
    own = [(spec.name, datatype_of(spec.dtype), _shape(spec.shape)) for spec in model.signature.inputs]
    if model.image is not None:
        own.append((IMAGE, BYTES, [-1]))
    return [*own, (TEXT, BYTES, [-1])] if model.text is not None else own


def _outputs(model: ServedModel) -> list[tuple[str, str, list[int]]]:
    own = [(spec.name, datatype_of(spec.dtype), _shape(spec.shape)) for spec in model.signature.outputs]
    return [*own, (LABEL, BYTES, [-1]), (SCORE, "FP32", [-1])] if model.classifies else own


def _shape(shape: tuple[int | str, ...]) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in shape]


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}
